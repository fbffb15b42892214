"""What a result was measured on: processor, memory, versions, commit, load."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlrt import doctor

PACKAGES = ("vlrt", "onnxruntime", "numpy", "av", "torch", "transformers")


def describe() -> dict[str, Any]:
    """Return the machine as JSON values; `name` is fit for a directory of results."""
    survey = doctor.survey()
    cpu = survey["cpu"]
    model = cpu.get("model") or platform.processor() or platform.machine()
    return {
        "name": f"{'-'.join(str(model).lower().split()[:4])}-{cpu['usable_cores']}-cores",
        "cpu": cpu,
        "memory_bytes": survey["memory_bytes"],
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load_average": list(os.getloadavg()),
    }


def command(module: str, arguments: Sequence[str]) -> str:
    """Return the command that repeats a bench, without where its result went."""
    words = list(arguments)
    if "--out" in words:
        del words[words.index("--out") : words.index("--out") + 2]
    return " ".join(["python -m", module, *words])


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
