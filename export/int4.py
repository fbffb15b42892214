"""int4 weights for com.microsoft::MatMulNBits: blocks of 32 inputs, with a scale and a zero point each. No graphs.

A zero point costs 4 bits per block. It lets the 16 codes span just what a block holds: symmetric codes, -8 to 7, would
clip the largest weight of one sign by a whole step.
"""

import numpy as np
from numpy.typing import NDArray

BITS = 4
BLOCK_SIZE = 32
ACCURACY_LEVEL = 4  # products of codes and of activations in int8, with a scale per token and block
CODE_MAX = 15
SUFFIX = ".q4"  # of the name of an initializer that holds codes

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


def shapes(num_outputs: int, num_inputs: int) -> tuple[tuple[int, int, int], tuple[int, int], tuple[int, int]]:
    """Return the shapes of codes, scales and zero points of a weight [out, in]."""
    blocks = -(-num_inputs // BLOCK_SIZE)
    return (num_outputs, blocks, BLOCK_SIZE // 2), (num_outputs, blocks), (num_outputs, -(-blocks // 2))


def quantize_blocks(weight: Floats) -> tuple[Bytes, Floats, Bytes]:
    """Quantise a weight [out, in] per block of inputs, `(code - zero point) * scale ~ weight`.

    Returns:
        codes [out, blocks, 16], two per byte, the even one low; scales [out, blocks]; zero points [out, blocks / 2],
        packed likewise. A last block that is not full ends in zeros, which the operator does not read.
    """
    num_outputs, num_inputs = weight.shape
    blocks = -(-num_inputs // BLOCK_SIZE)
    padded = np.zeros((num_outputs, blocks * BLOCK_SIZE), np.float32)
    padded[:, :num_inputs] = weight
    values = padded.reshape(num_outputs, blocks, BLOCK_SIZE)
    low, high = np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0)
    scale = (high - low) / np.float32(CODE_MAX)
    safe = np.where(scale > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)  # below, division is too coarse
    zero = np.rint(-low / safe)
    values /= safe[:, :, None]
    np.rint(values, out=values)
    values += zero[:, :, None]
    codes = np.clip(values, 0, CODE_MAX, out=values).astype(np.uint8)
    return _pairs(codes), safe, _pairs(zero.astype(np.uint8))


def _pairs(codes: Bytes) -> Bytes:
    """Pack codes of 4 bits along the last axis, the even one low; an odd count ends in a zero."""
    if codes.shape[-1] % 2:
        codes = np.concatenate([codes, np.zeros_like(codes[..., :1])], axis=-1)
    packed: Bytes = codes[..., ::2] | codes[..., 1::2] << np.uint8(BITS)
    return packed


def dequantize(codes: Bytes, scale: Floats, zero: Bytes, num_inputs: int) -> Floats:
    """Return the weight [out, in] that the operator computes with; arguments as `quantize_blocks` returns them."""
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
