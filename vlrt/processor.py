"""What this machine's processor is, and what its int8 arithmetic does. Looks; changes nothing."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As /proc/cpuinfo spells them, those that decide how fast a bundle answers; the first row is x86, the second Arm.
FEATURES = (
    *("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("asimddp", "i8mm", "bf16", "sve"),
)
VNNI = {"avx512_vnni", "avx_vnni"}


def describe() -> dict[str, Any]:
    """Return model, cores, usable_cores and features of the processor; None where the system does not tell."""
    usable = len(os.sched_getaffinity(0)) if sys.platform == "linux" else None
    model, features = platform.processor() or None, None
    info = Path("/proc/cpuinfo")
    if info.exists():
        rows = [line.partition(":") for line in info.read_text(errors="replace").splitlines()]
        first = {key.strip().lower(): value.strip() for key, _, value in reversed(rows)}
        model = first.get("model name", model)
        flags = set(first.get("flags", first.get("features", "")).split())
        features = [name for name in FEATURES if name in flags]
    return {"model": model, "cores": os.cpu_count(), "usable_cores": usable, "features": features}


def may_saturate(architecture: str, features: Sequence[str] | None) -> bool:
    """Return whether int8 products may be added in 16 bits and saturate: on x86 without VNNI, or where it is unknown.

    Args:
        architecture: as `platform.machine()` says.
        features: of the processor, as /proc/cpuinfo spells them; None: unknown.
    """
    if architecture.lower() not in ("x86_64", "amd64"):
        return False
    return features is None or not VNNI & set(features)
