"""What the tests of libvlrt_ort's integer layers share: levels, the op in fp64, and how near it must come."""

import ctypes
from typing import Any

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.ort_ops import EPS
from vlrt.backends import ort_library
from vlrt.export.linear_functions import Variant

LEVELS = ("amx_int8", "avx512_vnni", "avx_vnni")


@pytest.fixture(params=LEVELS)
def level(request, library) -> str:
    """Each level that this processor has."""
    if not has(library, request.param):
        pytest.skip(f"this processor has no level {request.param}")
    return request.param


def has(library: ort_library.Library, level: str) -> bool:
    find = ctypes.CDLL(str(library.path)).vlrt_int8
    find.restype = ctypes.c_char_p
    return find(level.encode()) != b"none"


def run(made: Any, given: dict[str, np.ndarray]) -> list[np.ndarray]:
    return made.run(None, {value.name: given[value.name] for value in made.get_inputs()})


def quantised(given: dict[str, np.ndarray]) -> np.ndarray:
    """What the op makes of x, in fp64; the codes are those of float32."""
    if "norm" not in given:
        return _quantised(given["x"])
    squares = (given["x"].astype(np.float64) ** 2).mean(axis=1, keepdims=True)
    return _quantised(given["x"] * given["norm"]) / np.sqrt(squares + EPS)


def _quantised(x: np.ndarray) -> np.ndarray:
    peak = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-20))
    return np.rint(x * (np.float32(127) / peak)).astype(np.float64) * (peak.astype(np.float64) / 127)


def exact(variant: Variant, given: dict[str, np.ndarray], x: np.ndarray) -> list[np.ndarray]:
    """The op in fp64 on an x that is used as it is."""
    outs = []
    for i in range(variant.num_parts - variant.down):
        out = x @ given[f"q_{i}"].astype(np.float64) * given[f"scale_{i}"]
        outs.append(out + given[f"bias_{i}"] if variant.bias else out)
    if variant.gated:
        with np.errstate(over="ignore"):
            outs = [outs[0] / (1 + np.exp(-outs[0])) * outs[1]]
    if variant.down:
        between = torch.from_numpy(outs[0].astype(np.float32)).bfloat16().float().numpy()
        out = _quantised(between) @ given["q_2"].astype(np.float64) * given["scale_2"]
        return [given["x"] + out + (given["bias_2"] if variant.bias else 0)]
    return [outs[0] + given["residual"]] if variant.residual else outs


def largest_terms(variant: Variant, given: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """The largest number [m] that each row of the outputs is a sum of: what its rounding errors go by."""
    sizes = {name: np.abs(a.astype(np.float64)) for name, a in given.items()}
    parts = []
    for i in range(variant.num_parts):
        part = np.abs(x @ given[f"q_{i}"].astype(np.float64) * given[f"scale_{i}"]).max(axis=1)
        parts.append(part + (sizes[f"bias_{i}"].max() if variant.bias else 0))
    size = parts[0] * parts[1] if variant.gated else np.max(parts, axis=0)
    return size + (sizes["residual"].max(axis=1) if variant.residual else 0)


def widths_of(variant: Variant, n: int) -> tuple[int, ...]:
    return (n,) * variant.num_parts if variant.gated else (n, 2 * n + 1, 1)[: variant.num_parts]


def assert_exact(made: Any, variant: Variant, given: dict[str, np.ndarray]) -> None:
    """Run a session of the op; fail where a row differs from exact integer sums by more than its floats' rounding."""
    x = quantised(given)
    sizes = largest_terms(variant, given, x)
    for out, want in zip(run(made, given), exact(variant, given, x), strict=True):
        for row, wanted, size in zip(out, want, sizes, strict=True):
            assert_close(np.append(row, np.float32(size)), np.append(wanted, size))
