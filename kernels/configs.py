"""Block sizes, warps and stages of the kernels, looked up per architecture, dtype, head dim and length.

One file per op in configs/: `{"tuned": bool, "rows": [{"arch": [...], "dtype": "half" | "float", "head_dim": largest,
"length": largest or null, "config": {...}}, ...]}`; the first row that fits counts. `benches/tune_<op>.py` writes
them; none is searched for at run time, so that the first call costs what the second does. Knows no kernel.
"""

import functools
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
# Shared memory that one block may take: CUDA C++ Programming Guide, table of technical specifications.
SHARED_BYTES = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 110: 227, 120: 99}
SHARED_BYTES = {arch: kib * 1024 for arch, kib in SHARED_BYTES.items()}
# Fixed here, since Triton's own default changes between releases, and results with it.
FP_FUSION = {"enable_fp_fusion": True}


class Compilation(NamedTuple):
    """One kernel as it is compiled ahead of time: with the arguments that its launcher would pass."""

    name: str
    kernel: Any
    arch: int
    signature: dict[str, str]  # argument -> Triton type
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # arguments that 16 divides
    options: dict[str, Any]


FLOATS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}  # what kernels compute in
TRITON_TYPES = {**FLOATS, torch.int32: "i32", torch.uint8: "u8"}


def compilation(
    kernel: Any,
    arch: int,
    dtype: torch.dtype,
    constexprs: Mapping[str, Any],
    options: Mapping[str, Any],
    pointers: Mapping[str, torch.dtype] | None = None,
    descriptors: Mapping[str, tuple[int, int]] | None = None,
    multiples: Collection[str] = (),
) -> Compilation:
    """Describe a kernel for `triton.compile`, its arguments typed by their names: `p_` pointers, strides, int sizes.

    16 divides pointers and strides, and the sizes that are named; nothing is known of the others.

    Args:
        kernel: a `triton.jit` function.
        arch: one of ARCHITECTURES.
        dtype: of what its pointers point to, `pointers` aside.
        constexprs: their values; of a pointer that is left out, None.
        options: for Triton's compiler.
        pointers: dtypes of the pointers that differ.
        descriptors: block shapes of the arguments that are tensor descriptors.
        multiples: sizes that 16 divides.
    """
    of_pointers = {name: dtype for name in kernel.arg_names if name.startswith("p_")} | dict(pointers or {})
    runtime = [name for name in kernel.arg_names if name not in constexprs]
    signature = {name: f"*{TRITON_TYPES[of_pointers[name]]}" if name in of_pointers else "i32" for name in runtime}
    for name, block in (descriptors or {}).items():
        if name in signature:
            signature[name] = f"tensordesc<{TRITON_TYPES[dtype]}{list(block)}>"
    aligned = [name for name in runtime if name.startswith(("p_", "stride_")) or name in multiples]
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    words = (
        f"{key.lower()}={value}"
        for key, value in constexprs.items()
        if value is not None and key not in ("SCALE", "ALIGN", "EPS")
    )
    absent = (f"no_{key[2:]}" for key, value in constexprs.items() if value is None and key.startswith("p_"))
    stages = (f"{key.removeprefix('num_')}={value}" for key, value in options.items() if key.startswith("num_"))
    name = "-".join((kernel.__name__, f"sm_{arch}", TRITON_TYPES[dtype], *words, *absent, *stages))
    return Compilation(name, kernel, arch, signature, dict(constexprs), tuple(aligned), dict(options))


def cases(op: str, arch: int, head_dims: Collection[int]) -> Iterator[tuple[torch.dtype, int, Mapping[str, int]]]:
    """Yield dtype, head dim and config of each row of an op's file that serves an architecture, at its largest."""
    for row in rows(op):
        if arch in row["arch"]:
            dtype = torch.bfloat16 if row["dtype"] == "half" else torch.float32
            yield dtype, max(dim for dim in head_dims if dim <= row["head_dim"]), row["config"]


@functools.cache
def architecture(device: torch.device) -> int:
    """Return the architecture, such as 90, whose configs serve a device: its own, or the nearest below.

    A CPU, on which kernels are interpreted, is served as 80.
    """
    if device.type != "cuda":
        return ARCHITECTURES[0]
    major, minor = torch.cuda.get_device_capability(device)
    return max((arch for arch in ARCHITECTURES if arch <= 10 * major + minor), default=ARCHITECTURES[0])


def dtype_class(dtype: torch.dtype) -> str:
    """Return "half" for 16-bit dtypes, "float" for float32."""
    return "half" if dtype.itemsize == 2 else "float"


@functools.cache
def rows(op: str) -> tuple[dict[str, Any], ...]:
    """Return the rows of an op's file, in order."""
    path = Path(__file__).parent / "configs" / f"{op}.json"
    return tuple(json.loads(path.read_text(encoding="utf-8"))["rows"])


@functools.cache
def lookup(op: str, arch: int, dtype: torch.dtype, head_dim: int, length: int) -> Mapping[str, int]:
    """Return the config of the first row that fits.

    Args:
        op: name of a file in configs/.
        arch: one of ARCHITECTURES.
        dtype: of the tensors.
        head_dim: elements of a head.
        length: what the file's lengths count; see the kernel's launcher.

    Raises:
        KeyError: no row fits: a defect of the file, which tests hold complete.
    """
    for row in rows(op):
        fits = arch in row["arch"] and row["dtype"] == dtype_class(dtype) and head_dim <= row["head_dim"]
        if fits and (row["length"] is None or length <= row["length"]):
            return row["config"]
    raise KeyError(f"{op}.json has no row for sm_{arch}, {dtype}, head dim {head_dim}, length {length}")


def options(config: Mapping[str, int]) -> dict[str, Any]:
    """Return what Triton's compiler is told, of a config."""
    return {"num_warps": config["num_warps"], "num_stages": config["num_stages"], **FP_FUSION}
