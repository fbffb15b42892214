"""A short search per kernel; the new config files go to <out>/configs, for a person to look at and to move."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches import tuning
from benches.inputs import Setting


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Search for one op; return what was tried."""
    setting = Setting(setting.device, setting.tiny, interpret=setting.device == "cpu")
    module = importlib.import_module(f"benches.tune_{item}")
    found = [tuning.search(problem, setting, expired) for problem in module.problems(setting)]
    return {"found": found, "files": [str(path) for path in tuning.write(found, out / "configs")]}
