"""The keys and values of a sequence in host memory: allocate, view, advance, rewind.

Slots are allocated once and filled from the front; each also has its row of the rotary tables, since M-RoPE turns a key
by where it stands in time and space and not by its slot. Several sequences may share a cache: each slot is of a lane,
and a lane sees its own slots and those of its trunk, what its sequence begins with. Knows no model and no engine.
"""

import math
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config
from vlrt.errors import ConfigError

Array = NDArray[np.float32]

TRUNK = 1 << 16  # lanes k * TRUNK are trunks; lanes between them and the next one go on from them


class Spare:
    """The memory of the cache that was let go last, for the next one.

    Pages that the system has to hand out anew take longer than what is written to them.
    """

    def __init__(self) -> None:
        self._kept: list[Array] = []  # at most one; changed by single calls, since memory comes back in any thread

    def take(self, count: int) -> Array:
        """Return [count] float32 that nobody else uses; what is in it is not defined.

        It comes back once neither the array is left nor a view of it.
        """
        try:
            memory = self._kept.pop()
        except IndexError:
            memory = None
        if memory is None or not count <= memory.size <= 2 * count:
            memory = np.zeros(count, np.float32)  # NumPy asks for huge pages where that is much
        lent = np.frombuffer(memory.data, np.float32, count)  # views refer to it, not to what owns the memory
        weakref.finalize(lent, self._kept.__setitem__, slice(None), [memory]).atexit = False
        return lent

    def let_go(self) -> None:
        """Keep nothing."""
        self._kept.clear()


class KVCache:
    """Static cache of one sequence.

    Args:
        decoder: gives layers, heads and head dim.
        capacity: number of slots M.
        spare: lends the memory; None: new memory, which is touched only as slots are filled.

    Attributes:
        keys: one [1, H_kv, M, D] float32 per layer.
        values: likewise.
        cos: [M, D/2] float32, row m for slot m.
        sin: [M, D/2] float32.
        lanes: [M] int32, of each slot; 0, a trunk, where there is one sequence.
        past_length: int32 array of no axes, slots in use; engines read it in place.
    """

    def __init__(self, decoder: config.Decoder, capacity: int, spare: Spare | None = None) -> None:
        shape = (2, decoder.num_layers, 1, decoder.num_kv_heads, capacity, decoder.head_dim)
        slots = np.zeros(shape, np.float32) if spare is None else spare.take(math.prod(shape)).reshape(shape)
        self.keys: list[Array] = [*slots[0]]
        self.values: list[Array] = [*slots[1]]
        self.cos = np.zeros((capacity, decoder.head_dim // 2), np.float32)
        self.sin = np.zeros_like(self.cos)
        self.lanes = np.zeros(capacity, np.int32)
        self.past_length = np.zeros((), np.int32)

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.cos.shape[0]

    @property
    def length(self) -> int:
        """Number of slots in use."""
        return int(self.past_length)

    def place(self, cos: Array, sin: Array, lanes: NDArray[np.int32] | int = 0) -> None:
        """Write the rotary rows [S, D/2], and the lanes [S], of the next S slots.

        Raises:
            ConfigError: fewer than S slots are free.
        """
        stop = self.length + cos.shape[0]
        if stop > self.capacity:
            raise ConfigError(
                f"the sequence would take {stop} slots of a cache of {self.capacity}; ask with fewer frames or tokens"
            )
        self.cos[self.length : stop], self.sin[self.length : stop] = cos, sin
        self.lanes[self.length : stop] = lanes

    def bias(self, count: int) -> Array:
        """Return [1, 1, count, length + count] for attention of the next `count` slots, -inf where a lane is hidden.

        Which slots come later is not in it.
        """
        lanes = self.lanes[: self.length + count]
        own = lanes[self.length :, None]
        seen = (lanes == own) | (lanes == own // TRUNK * TRUNK)
        return np.where(seen, np.float32(0), np.float32(-np.inf))[None, None]

    def advance(self, count: int) -> None:
        """Take `count` slots into use, their keys and values having been written."""
        assert 0 <= count <= self.capacity - self.length
        self.past_length += np.int32(count)

    def rewind(self, count: int) -> None:
        """Free the last `count` slots."""
        assert 0 <= count <= self.length
        self.past_length -= np.int32(count)

    @property
    def num_bytes(self) -> int:
        """Bytes of the slots in use."""
        parts = [*self.keys, *self.values, self.cos, self.sin]
        return sum(part.nbytes for part in parts) * self.length // self.capacity

    def take(self, other: "KVCache", lane: int = 0) -> None:
        """Copy what another cache holds into the next slots of this one, of which as many are free, as a lane."""
        count, free = other.length, self.length
        for mine, its in ((self.keys, other.keys), (self.values, other.values)):
            for target, source in zip(mine, its, strict=True):
                target[:, :, free : free + count] = source[:, :, :count]
        self.place(other.cos[:count], other.sin[:count], lane)
        self.advance(count)

    def parts(self) -> dict[str, NDArray[Any]]:
        """Return what the slots in use hold, by name, on the host: `fill` is its inverse.

        keys.<layer> and values.<layer> [1, H_kv, length, D], cos and sin [length, D/2]; views where they can be.
        """
        parts = {"cos": self.cos[: self.length], "sin": self.sin[: self.length]}
        for layer in range(len(self.keys)):
            parts[f"keys.{layer}"], parts[f"values.{layer}"] = self.view(layer)
        return parts

    def fill(self, parts: Mapping[str, NDArray[Any]]) -> None:
        """Copy what `parts` returned into this cache, which is empty and has as many slots or more."""
        assert self.length == 0
        count = len(parts["cos"])
        for layer in range(len(self.keys)):
            self.keys[layer][:, :, :count] = parts[f"keys.{layer}"]
            self.values[layer][:, :, :count] = parts[f"values.{layer}"]
        self.place(parts["cos"], parts["sin"])
        self.advance(count)

    def view(self, layer: int) -> tuple[Array, Array]:
        """Return the keys and values in use of one layer, [1, H_kv, length, D] each, without copying."""
        return self.keys[layer][:, :, : self.length], self.values[layer][:, :, : self.length]
