"""Every op next to its rivals: see `bench_<op>.py`."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benches import op_bench
from benches.inputs import Setting


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return the rows of one op."""
    bench = importlib.import_module(f"benches.bench_{item}")
    return op_bench.run_cases(bench.cases(setting), setting, expired)
