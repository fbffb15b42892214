"""The parity gate's row for int4: weights as they were written, against those of the checkpoint.

The errors of verify.py compare whole models, where one damaged layer of dozens hides in the rounding of the rest.
This looks at every matrix by itself, however deep the model is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlrt.bundle import Check
from vlrt.export import int4

# A block of 32 spans at most sqrt(2) of its norm, in 15 steps. Rounding, evenly spread, is off by step / sqrt(12):
# by at most sqrt(2) / 15 * sqrt(32 / 12) = 0.154 of the norm, and by up to an eighth more where the step of a block
# that reaches far is rounded up. Normal weights give 0.08; rows in a wrong order give 1.4.
LIMIT = 0.18


def check(path: Path, fetch: Callable[[str], NDArray[np.float32]]) -> Check:
    """Compare a graph's int4 weights, one in memory at a time.

    Args:
        path: of the .onnx file.
        fetch: tensors of the checkpoint by name.

    Returns:
        The largest relative RMS error of any.
    """
    worst = 0.0
    for node in ir.load(path).graph:
        for i, codes in enumerate(node.inputs):
            if codes is None or not str(codes.name).endswith(int4.SUFFIXES[0]):
                continue
            made = [_array(value) for value in node.inputs[i : i + len(int4.SUFFIXES)]]
            weight = fetch(str(codes.name).removesuffix(int4.SUFFIXES[0]))
            value = _error(made, weight)
            worst = max(worst, value if np.isfinite(value) else 1e30)
    return Check("int4 weights: largest relative error", worst, LIMIT, worst <= LIMIT)


def _error(made: list[NDArray[Any]], weight: NDArray[np.float32]) -> float:
    """Return the relative error of a matrix; none is left of one whose scales are no multiples of their column's."""
    codes, scales, zeros, column = made
    if not np.allclose(scales, np.rint(scales / column[:, None]) * column[:, None], rtol=1e-5, atol=0):
        return np.inf
    error = np.linalg.norm(int4.dequantize(codes, scales, zeros, weight.shape[1]) - weight)
    return float(error / max(float(np.linalg.norm(weight)), 1e-30))


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array
