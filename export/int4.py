"""int4 weights for com.microsoft::MatMulNBits: blocks of 32 inputs, with a scale and a zero point each. No graphs.

A zero point costs 4 bits per block. It lets the 16 codes span just what a block holds: symmetric codes, -8 to 7, would
clip the largest weight of one sign by a whole step. Scales are whole multiples of one for all blocks of an output, so
small that every weight is an int8 times that one: kernels read a prompt with products of bytes (kernels/ort/linear.h).
"""

import numpy as np
from numpy.typing import NDArray

BITS = 4
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4  # products of codes and of activations in int8, with a scale per token and block
CODE_MAX = 15
INT8_MAX = 127
FACTOR_MAX = 15  # with the zero point in the middle, 8 codes to one side
SUFFIXES = (".q4", ".scales", ".zeros", ".scale")  # of the names of initializers: codes and what goes with them
BYTES = SUFFIXES[::2]  # of those that hold two numbers of 4 bits to a byte

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]
Quantized = tuple[Bytes, Floats, Bytes, Floats]


def shapes(num_outputs: int, num_inputs: int) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of codes, scales, zero points and scales of whole columns, of a weight [out, in]."""
    blocks = -(-num_inputs // BLOCK_SIZE)
    return (num_outputs, blocks, BLOCK_SIZE // 2), (num_outputs, blocks), (num_outputs, -(-blocks // 2)), (num_outputs,)


def quantize_blocks(weight: Floats) -> Quantized:
    """Quantise a weight [out, in] per block of inputs, `(code - zero point) * scale ~ weight`.

    The step that a block wants is rounded to a multiple of its column's, down or up, by which gives less of an error.

    Returns:
        codes [out, blocks, 16], two per byte, the even one low; scales [out, blocks]; zero points [out, blocks / 2],
        packed likewise; scales of columns [out], of which scales are multiples by whole numbers. A last block that is
        not full ends in zeros, which the operator does not read.
    """
    num_outputs, num_inputs = weight.shape
    blocks = -(-num_inputs // BLOCK_SIZE)
    padded = np.zeros((num_outputs, blocks * BLOCK_SIZE), np.float32)
    padded[:, :num_inputs] = weight
    values = padded.reshape(num_outputs, blocks, BLOCK_SIZE)
    low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
    step = np.maximum((high - low) / np.float32(CODE_MAX), np.finfo(np.float32).tiny)
    # So that a step rounded up is at most FACTOR_MAX, and that codes rounded away from zero are an int8.
    most = np.float32(INT8_MAX - FACTOR_MAX / 2)
    column = np.maximum(np.maximum(-low, high) / most, step / np.float32(FACTOR_MAX - 1)).max(axis=1)
    column = np.where(column > np.finfo(np.float32).tiny, column, 1).astype(np.float32)  # below, division is too coarse
    wanted = step / column[:, None]
    down, up = (_with_factor(values, low, column, rounded) for rounded in (np.floor(wanted), np.floor(wanted) + 1))
    better = down[3] <= up[3]
    codes = np.where(better[:, :, None], down[0], up[0])
    scale, zero = (np.where(better, down[i], up[i]) for i in (1, 2))
    return _pairs(codes), scale, _pairs(zero), column


def _with_factor(values: Floats, low: Floats, column: Floats, factor: Floats) -> tuple[Bytes, Floats, Bytes, Floats]:
    """Return codes, scales, zero points, not packed, and squared errors, of steps so many times the column's."""
    factor = np.clip(factor, 1, FACTOR_MAX).astype(np.float32)
    reach = INT8_MAX // factor  # codes to each side that an int8 holds
    scale = factor * column[:, None]
    zero = np.clip(np.rint(-low / scale), np.maximum(CODE_MAX - reach, 0), np.minimum(reach, CODE_MAX))
    codes = np.clip(np.rint(values / scale[:, :, None]) + zero[:, :, None], 0, CODE_MAX)
    error = np.square((codes - zero[:, :, None]) * scale[:, :, None] - values).sum(axis=2)
    return codes.astype(np.uint8), scale, zero.astype(np.uint8), error


class Last:
    """`quantize_blocks`, which remembers its last weight: four arrays are made of each in turn."""

    def __init__(self) -> None:
        self._weight: Floats | None = None
        self._made: Quantized | None = None

    def __call__(self, weight: Floats) -> Quantized:
        """See `quantize_blocks`."""
        if self._made is None or self._weight is not weight:
            self._weight, self._made = weight, quantize_blocks(weight)
        return self._made


def _pairs(codes: Bytes) -> Bytes:
    """Pack codes of 4 bits along the last axis, the even one low; an odd count ends in a zero."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Bytes = codes[..., ::2] | codes[..., 1::2] << np.uint8(BITS)
    return packed


def dequantize(codes: Bytes, scale: Floats, zero: Bytes, num_inputs: int) -> Floats:
    """Return the weight [out, in] that the operator computes with; arguments: the first of `quantize_blocks`."""
    num_outputs, blocks = scale.shape
    values = _halves(codes).astype(np.float32)
    values -= _halves(zero)[:, :blocks, None]
    values *= scale[:, :, None]
    weight: Floats = values.reshape(num_outputs, -1)[:, :num_inputs]
    return weight


def _halves(packed: Bytes) -> Bytes:
    """Undo `_pairs`; an odd count keeps its zero."""
    halves: Bytes = np.stack([packed & CODE_MAX, packed >> np.uint8(BITS)], axis=-1).reshape(*packed.shape[:-1], -1)
    return halves
