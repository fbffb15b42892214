"""A KV cache kept in int8 between questions: a quarter of its size, and read back into float32 before it is used.

Symmetric, one scale per layer, head and slot, so that no slot suffers from another's outliers. Knows no engine.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vlrt.kv_cache import Array, KVCache

INT8_MAX = 127


@dataclass(frozen=True)
class PackedCache:
    """What a KV cache held.

    Attributes:
        rows: of keys, then of values, per layer: [1, H_kv, n, D] int8.
        scales: of the same: [1, H_kv, n, 1] float32; `rows * scales` is what was packed.
        cos: [n, D/2] float32.
        sin: [n, D/2] float32.
    """

    rows: tuple[NDArray[np.int8], ...]
    scales: tuple[Array, ...]
    cos: Array
    sin: Array

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes."""
        floats = (*self.scales, self.cos, self.sin)
        return sum(part.nbytes for part in self.rows) + sum(part.nbytes for part in floats)

    @property
    def length(self) -> int:
        """Number of slots."""
        return len(self.cos)

    def unpack(self, cache: KVCache) -> None:
        """Write the slots into a cache in host memory, which is empty and has as many or more."""
        assert cache.length == 0
        for target, rows, scales in zip([*cache.keys, *cache.values], self.rows, self.scales, strict=True):
            np.multiply(rows, scales, out=target[:, :, : self.length])
        cache.place(self.cos, self.sin)
        cache.advance(self.length)


def pack(cache: KVCache) -> PackedCache:
    """Return what a cache in host memory holds, in int8."""
    count = cache.length
    packed = [_quantise(part[:, :, :count]) for part in (*cache.keys, *cache.values)]
    rows, scales = zip(*packed, strict=True)
    return PackedCache(rows, scales, cache.cos[:count].copy(), cache.sin[:count].copy())


def _quantise(part: Array) -> tuple[NDArray[np.int8], Array]:
    largest = np.abs(part).max(axis=-1, keepdims=True)
    scales = np.maximum(largest, np.finfo(np.float32).tiny * INT8_MAX) / np.float32(INT8_MAX)
    return np.rint(part / scales).astype(np.int8), scales
