"""What this machine offers: backends, versions, processor features, memory.

Looks and reports; it opens no model and changes nothing. A backend that cannot run comes with its reason.
"""

import importlib.metadata
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import vlrt
from vlrt import processor
from vlrt.backends import ort_library, select

RUNTIME_PACKAGES = ("numpy", "onnxruntime", "tokenizers", "av", "pillow", "jinja2", "rich")
EXPORT_PACKAGES = ("torch", "safetensors", "onnx", "onnx_ir", "onnxscript")
EXTRAS = {"export": EXPORT_PACKAGES, "train": ("torch", "safetensors", "accelerate", "peft", "yaml", "tensorboard")}


@dataclass(frozen=True)
class Ability:
    """One thing that vlrt may do on this machine; `reason` says why not, or with what."""

    name: str
    available: bool
    reason: str


def survey() -> dict[str, Any]:
    """Return all of it as JSON-ready values.

    Keys: vlrt (version), python, platform, abilities (rows of Ability), versions (package to version, None: not
    installed), cpu (model, cores, usable_cores, features; None where the system does not tell), memory_bytes (total,
    available; None where the system does not tell).
    """
    return {
        "vlrt": vlrt.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "abilities": [asdict(ability) for ability in abilities()],
        "versions": {name: _version(name) for name in (*RUNTIME_PACKAGES, *EXPORT_PACKAGES)},
        "cpu": processor.describe(),
        "memory_bytes": _memory(),
    }


def abilities() -> list[Ability]:
    """Return one row per backend, and one for exporting."""
    cuda = "this version of vlrt has no such backend; the ort backend runs on the CPU"
    torch = select.unavailable("torch")
    return [
        _ort(),
        _ort_library(),
        exact_int8(platform.machine(), processor.describe()["features"]),
        huge_pages(),
        Ability("torch backend, CPU", torch is None, torch or f"torch {_version('torch')}"),
        _torch_cuda(torch),
        Ability("ort backend, CUDA", False, cuda),
        Ability("tensorrt backend", False, cuda),
        _export(),
    ]


def _ort() -> Ability:
    reason = select.unavailable("ort")
    return Ability("ort backend, CPU", reason is None, reason or f"onnxruntime {_version('onnxruntime')}")


def _ort_library() -> Ability:
    found = ort_library.find()
    if isinstance(found, str):
        return Ability("libvlrt_ort", False, found)
    exact, coarse = (found.levels[name] for name in (ort_library.AUTO, ort_library.AUTO_BF16))
    also = "" if exact == coarse else f"; {coarse} (bf16) in bundles that are not fp32"
    return Ability("libvlrt_ort", True, f"attention with {exact}{also}; int8 with {found.int8}, fp32 with {found.fp32}")


def _torch_cuda(reason: str | None) -> Ability:
    name = "torch backend, CUDA"
    if reason is not None:
        return Ability(name, False, reason)
    from vlrt.backends.torch import unavailable

    if (reason := unavailable("cuda")) is not None:
        return Ability(name, False, reason)
    triton = _version("triton")
    return Ability(name, triton is not None, f"triton {triton}" if triton else "not installed: triton")


def exact_int8(architecture: str, features: list[str] | None) -> Ability:
    """Return how int8 products become exact sums: on x86 without VNNI by a detour, see `backends.ort.EXACT_INT8`.

    Args:
        architecture: as `platform.machine()` says.
        features: of the processor, as /proc/cpuinfo spells them; None: unknown.
    """
    name = "exact int8"
    if architecture.lower() not in ("x86_64", "amd64"):
        return Ability(name, True, f"{architecture} adds products in 32 bits")
    if features is None:
        return Ability(name, True, "this system does not tell whether there is VNNI; the slower kernels are taken")
    if not processor.may_saturate(architecture, features):
        return Ability(name, True, f"with {min(processor.VNNI & set(features))}")
    return Ability(name, True, "this processor has no VNNI: products are widened to 16 bits first, which is slower")


def huge_pages(setting: Path = Path("/sys/kernel/mm/transparent_hugepage/enabled")) -> Ability:
    """Return whether Linux gives huge pages to those who ask, as weights and caches do.

    Args:
        setting: the kernel's: what is chosen stands in brackets.
    """
    name = "huge pages"
    try:
        chosen = setting.read_text(encoding="ascii").partition("[")[2].partition("]")[0]
    except (OSError, ValueError):
        return Ability(name, False, "this system does not tell whether it has them")
    if chosen in ("always", "madvise"):
        return Ability(name, True, chosen)
    return Ability(
        name, False, f"{setting} is {chosen!r}: memory is read more slowly; to do, as root: echo madvise > {setting}"
    )


def _export() -> Ability:
    missing = [name for name in EXPORT_PACKAGES if _version(name) is None]
    if missing:
        return Ability("export", False, f"not installed: {', '.join(missing)}; to do: pip install 'vlrt[export]'")
    return Ability("export", True, f"torch {_version('torch')}, onnx {_version('onnx')}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _memory() -> dict[str, int | None]:
    info = Path("/proc/meminfo")
    if not info.exists():
        return {"total": None, "available": None}
    kib = {
        key: int(value.split()[0]) for key, _, value in (row.partition(":") for row in info.read_text().splitlines())
    }
    return {"total": kib["MemTotal"] * 1024, "available": kib["MemAvailable"] * 1024}
