"""What a result was measured on: processor, memory, versions, commit, load."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlrt import doctor

PACKAGES = ("vlrt", "onnxruntime", "numpy", "av", "torch", "triton", "transformers")


def describe() -> dict[str, Any]:
    """Return the machine as JSON values; `name` is fit for a directory of results."""
    survey = doctor.survey()
    cpu = survey["cpu"]
    model = cpu.get("model") or platform.processor() or platform.machine()
    return {
        "name": f"{'-'.join(re.sub(r'[(](r|tm)[)]', '', str(model).lower()).split()[:4])}-{cpu['usable_cores']}-cores",
        "cpu": cpu,
        "memory_bytes": survey["memory_bytes"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_average": list(os.getloadavg()),
    }


def results(name: str | None = None) -> Path:
    """Return the directory of a machine's results; None: of this machine's."""
    return Path(__file__).parent / "results" / (name or describe()["name"])


def command(module: str, arguments: Sequence[str]) -> str:
    """Return the command that repeats a bench, without where its result went."""
    words = list(arguments)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python -m", module, *words])


def write_result(bench: str, arguments: Sequence[str], out: Path | None, **values: Any) -> Path:
    """Write the JSON of a bench, with what it was measured on, and return its path.

    Args:
        bench: the module's name without `bench_`.
        arguments: of its command line.
        out: the file; None: in benches/results, by the machine's name.
        values: what was measured.
    """
    described = describe()
    result = {
        "bench": bench,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(f"benches.bench_{bench}", arguments),
        "machine": described,
        **values,
    }
    path = out or results(described["name"]) / f"{bench}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return path


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
