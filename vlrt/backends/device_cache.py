"""Keys and values of one sequence on a device, in memory that outlives it: graphs are captured for fixed addresses.

A `Pool` lends storage to sequences, one at a time; what a sequence leaves there is never read by the next. How much is
in use is known to the host without asking the device. Knows no model.
"""

import threading
import weakref
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlrt import config
from vlrt.errors import ConfigError
from vlrt.kv_cache import KVCache

SLOTS = 1024  # storage is allocated in multiples of so many


class Storage:
    """Memory for one sequence at a time.

    Attributes:
        keys: one [1, H_kv, M, D] per layer.
        values: likewise.
        cos: [M, D/2] float32, row m for slot m.
        sin: [M, D/2] float32.
        past_length: int32 tensor of no axes on the device, slots in use.
        graphs: what was captured for these addresses, by number of positions.
    """

    def __init__(self, decoder: config.Decoder, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        shape = (1, decoder.num_kv_heads, capacity, decoder.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(decoder.num_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(decoder.num_layers)]
        self.cos = torch.zeros(capacity, decoder.head_dim // 2, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.past_length = torch.zeros((), dtype=torch.int32, device=device)
        self.graphs: dict[int, Any] = {}

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self.cos.shape[0]


class DeviceCache(KVCache):
    """`kv_cache.KVCache` over lent storage: it may have more slots than were asked for, of which none is used.

    Args:
        storage: of at least `capacity` slots.
        capacity: number of slots.
    """

    def __init__(self, storage: Storage, capacity: int) -> None:
        self.storage = storage
        self._capacity, self._length = capacity, 0
        storage.past_length.zero_()

    @property
    def capacity(self) -> int:
        """Number of slots."""
        return self._capacity

    @property
    def length(self) -> int:
        """Number of slots in use."""
        return self._length

    def place(self, cos: NDArray[np.float32], sin: NDArray[np.float32], lanes: Any = 0) -> None:
        """Write the rotary rows [S, D/2] of the next S slots; all are of one sequence.

        Raises:
            ConfigError: fewer than S slots are free.
        """
        stop = self._length + len(cos)
        if stop > self._capacity:
            raise ConfigError(
                f"the sequence would take {stop} slots of a cache of {self._capacity}; ask with fewer frames or tokens"
            )
        for table, rows in ((self.storage.cos, cos), (self.storage.sin, sin)):
            table[self._length : stop].copy_(torch.from_numpy(np.ascontiguousarray(rows, np.float32)))

    def advance(self, count: int) -> None:
        """Take `count` slots into use, their keys and values having been written."""
        self._move(count)

    def rewind(self, count: int) -> None:
        """Free the last `count` slots."""
        self._move(-count)

    @property
    def num_bytes(self) -> int:
        """Bytes of the slots in use."""
        held = self.storage
        parts = [*held.keys, *held.values, held.cos, held.sin]
        return sum(x.numel() * x.element_size() for x in parts) * self._length // held.capacity

    def take(self, other: KVCache, lane: int = 0) -> None:
        """Copy what another cache holds into this one, which is empty and has as many slots or more."""
        assert isinstance(other, DeviceCache) and self._length == 0  # noqa: PT018 - one condition of the caller
        count, mine, its = other.length, self.storage, other.storage
        for targets, sources in ((mine.keys, its.keys), (mine.values, its.values)):
            for target, source in zip(targets, sources, strict=True):
                target[:, :, :count] = source[:, :, :count]
        mine.cos[:count], mine.sin[:count] = its.cos[:count], its.sin[:count]
        self.advance(count)

    def view(self, layer: int) -> tuple[Any, Any]:
        """Return the keys and values in use of one layer, [1, H_kv, length, D] each, without copying."""
        return self.storage.keys[layer][:, :, : self._length], self.storage.values[layer][:, :, : self._length]

    def _move(self, count: int) -> None:
        assert 0 <= self._length + count <= self._capacity
        self._length += count
        self.storage.past_length.add_(count)


class Pool:
    """Lends storage; what comes back is lent again before more is allocated.

    Args:
        decoder: gives layers, heads and head dim.
        dtype: of keys and values.
        device: where they are.
    """

    def __init__(self, decoder: config.Decoder, dtype: torch.dtype, device: torch.device) -> None:
        self._given = (dtype, device)
        self._decoder = decoder
        self._free: list[Storage] = []
        self._lock = threading.Lock()

    def lend(self, capacity: int) -> DeviceCache:
        """Return an empty cache of `capacity` slots; its storage comes back when nobody holds the cache any more."""
        with self._lock:
            fitting = [storage for storage in self._free if storage.capacity >= capacity]
            if fitting:
                storage = min(fitting, key=lambda storage: storage.capacity)
                self._free.remove(storage)
            else:
                self._free.clear()  # too small for what is asked now: their memory is needed more than their graphs
                storage = Storage(self._decoder, -(-capacity // SLOTS) * SLOTS, *self._given)
        cache = DeviceCache(storage, capacity)
        weakref.finalize(cache, self._free.append, storage)
        return cache


class LentAttention:
    """Causal attention over lent storage: see `models.decoder.Attend`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """See `Attend`."""
        from vlrt import ops

        held = self._storage
        out: Tensor = ops.video_attention_(
            q, k, v, held.cos, held.sin, held.keys[layer], held.values[layer], held.past_length
        )
        return out
