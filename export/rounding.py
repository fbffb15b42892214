"""Simulates what int8 and int4 products round, to say how far off a layer's outputs will be. No graphs, no files.

Weights: as `quantize.quantize_columns` rounds them to int8, or `int4.quantize_blocks` to int4. Each row of activations
by its own largest magnitude, as kernels/ort/linear.h does; int4's operator in ONNX Runtime does so by blocks, which is
finer.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlrt.export import int4, quantize

Kind = Literal["int8", "int4"]
Floats = NDArray[np.float32]


def errors(x: Floats, weights: Sequence[Floats], kind: Kind, scale: Floats | None = None) -> list[float]:
    """Return, for each weight, the mean over rows of x of the relative error of `x @ weight.T`.

    Rows count alike, since each is rounded by itself: some models have one whose numbers are thousands of times those
    of the others.

    Args:
        x: [n, in].
        weights: [out, in] each.
        kind: of rounding.
        scale: [in], what columns of the weights are multiplied by, and those of x divided, before they are rounded.
    """
    together = np.concatenate(weights)  # each row of a weight is rounded by itself, too
    exact = x @ together.T
    if scale is not None:
        x, together = x / scale, together * scale
    difference = product(x, together, kind) - exact
    ends = np.cumsum([len(weight) for weight in weights])[:-1]
    return [
        float(np.mean(_lengths(off) / np.maximum(_lengths(right), np.finfo(np.float32).tiny)))
        for off, right in zip(np.split(difference, ends, axis=1), np.split(exact, ends, axis=1), strict=True)
    ]


def product(x: Floats, weight: Floats, kind: Kind) -> Floats:
    """Return `x @ weight.T`, [n, out], as a kind of rounding computes it."""
    if kind == "int4":
        codes, scales, zeros, _ = int4.quantize_blocks(weight)
        out: Floats = _rounded(x) @ int4.dequantize(codes, scales, zeros, x.shape[1]).T
        return out
    q, scale = quantize.quantize_columns(weight)
    return (_rounded(x) @ q.astype(np.float32)) * scale


def _rounded(x: Floats) -> Floats:
    """Return rows of x as int8 codes of their own step hold them."""
    step = np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-20)) / np.float32(quantize.INT8_MAX)
    rounded: Floats = np.rint(x / step) * step
    return rounded


def _lengths(rows: Floats) -> Floats:
    norms: Floats = np.linalg.norm(rows, axis=1)
    return norms
