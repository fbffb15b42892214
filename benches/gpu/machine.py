"""What the figures were measured on: card, driver, clocks, versions, commit."""

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benches import machine
from benches.inputs import Setting

QUERIED = ("name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")
QUERIED += ("temperature.gpu", "memory.used", "utilization.gpu")


def run(item: str, setting: Setting, expired: Callable[[], bool], out: Path) -> dict[str, Any]:
    """Return the machine, and its card where it has one."""
    found: dict[str, Any] = {"host": machine.describe()}
    if setting.device != "cuda":
        return found
    card = torch.cuda.get_device_properties(0)
    values = {name: getattr(card, name, None) for name in ("name", "total_memory", "multi_processor_count")}
    values |= {name: getattr(card, name, None) for name in ("L2_cache_size", "shared_memory_per_block_optin")}
    values |= {"capability": [card.major, card.minor], "cuda": torch.version.cuda, "smi": _smi()}
    return found | {"card": values, "cudnn": torch.backends.cudnn.version()}


def _smi() -> dict[str, str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERIED)}", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return None
    return dict(zip(QUERIED, (value.strip() for value in lines[0].split(",")), strict=False))
