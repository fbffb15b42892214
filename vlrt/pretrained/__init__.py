"""Trained models that come with the package: small ones, which answer questions about clips of moving shapes.

Each is a Hugging Face checkpoint directory in this folder with a model card, README.md, that tells how it was made and
how well it answers. `examples/reproduce.py` makes them. Knows no more than where they are.
"""

from pathlib import Path

HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Return the names of the models, sorted."""
    return tuple(sorted(path.parent.name for path in HERE.glob("*/config.json")))


def find(given: str | Path) -> Path:
    """Return a model's directory for its name; any other path, and one where something is, as it was given."""
    return HERE / given if str(given) in names() and not Path(given).exists() else Path(given)
