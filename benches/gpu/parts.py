"""What is known so far: one JSON file per item, written as soon as the item ends. Survives any crash.

An item's file holds `seconds` and one of `result`, `error` (a traceback) and `skipped` (why).
"""

import json
from pathlib import Path
from typing import Any


def path(out: Path, phase: str, item: str) -> Path:
    """Return an item's file."""
    return out / "parts" / phase / f"{item}.json"


def write(out: Path, phase: str, item: str, **values: Any) -> None:
    """Write an item's file, whole or not at all."""
    file = path(out, phase, item)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    partial.rename(file)


def read(out: Path) -> dict[str, dict[str, Any]]:
    """Return phase -> item -> what its file holds."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted((out / "parts").glob("*/*.json")):
        found.setdefault(file.parent.name, {})[file.stem] = json.loads(file.read_text(encoding="utf-8"))
    return found
