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
# by at most sqrt(2) / 15 * sqrt(32 / 12) = 0.154 of the norm. Normal weights give 0.08; rows in a wrong order give 1.4.
LIMIT = 0.16


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
        if node.op_type == "MatMulNBits":
            codes, scale, zero = (_array(value) for value in node.inputs[1:4])
            assert node.inputs[1] is not None
            assert node.inputs[1].name is not None
            weight = fetch(node.inputs[1].name.removesuffix(int4.SUFFIX))
            error = np.linalg.norm(int4.dequantize(codes, scale, zero, weight.shape[1]) - weight)
            value = float(error / max(float(np.linalg.norm(weight)), 1e-30))
            worst = max(worst, value if np.isfinite(value) else 1e30)
    return Check("int4 weights: largest relative error", worst, LIMIT, worst <= LIMIT)


def _array(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array
