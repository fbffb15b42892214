"""Builds libvlrt_ort for tests."""

import importlib.util
from pathlib import Path

from vlrt.backends import ort_library

ROOT = Path(__file__).parent.parent


def build(directory: Path) -> ort_library.Library | str:
    """Return the library, built into a directory, or why it cannot be built here."""
    if not (ROOT / "setup.py").exists():
        return "these tests run beside an installed wheel that lacks it"
    spec = importlib.util.spec_from_file_location("vlrt_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.build_library(directory) or ort_library.find(directory)
