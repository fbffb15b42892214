"""Trained models that come with the package: small ones, which answer questions about clips of moving shapes.

Each is a Hugging Face checkpoint directory of this folder with a model card, README.md, that tells how it was made and
how well it answers. `examples/reproduce.py` makes them. Knows no more than where they are.
"""

from pathlib import Path

from vlrt.errors import CheckpointError

HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """Return the names of the models, sorted."""
    return tuple(sorted(path.parent.name for path in HERE.glob("*/config.json")))


def path(name: str) -> Path:
    """Return the checkpoint directory of a model.

    Raises:
        CheckpointError: there is none of that name.
    """
    if name not in names():
        raise CheckpointError(f"no model {name!r} comes with vlrt; accepted: {', '.join(names()) or 'none is there'}")
    return HERE / name
