"""The KV cache: slots, their rotary rows, and what happens at its edges."""

import numpy as np
import pytest

from tests.fakes import fake_model
from vlrt.errors import ConfigError
from vlrt.kv_cache import KVCache, Spare


def rows(count, value):
    return np.full((count, 4), value, np.float32), np.full((count, 4), -value, np.float32)


def test_rows_go_to_the_next_slots():
    """Catches rotary rows placed at the front, or before the slots in use were counted."""
    cache = KVCache(fake_model().decoder, 5)
    cache.place(*rows(3, 1))
    assert cache.length == 0  # placed, but not in use before keys and values are there
    cache.advance(3)
    cache.place(*rows(2, 2))
    cache.advance(2)
    assert (cache.length, cache.capacity) == (5, 5)
    assert cache.cos[:, 0].tolist() == [1, 1, 1, 2, 2]
    assert cache.sin[:, 0].tolist() == [-1, -1, -1, -2, -2]
    cache.rewind(3)
    cache.place(*rows(1, 3))
    assert cache.cos[:3, 0].tolist() == [1, 1, 3]


def test_a_full_cache_is_refused_before_it_is_touched():
    """Catches rows that are cut off without a word, and a cache left half written."""
    cache = KVCache(fake_model().decoder, 4)
    cache.place(*rows(3, 1))
    cache.advance(3)
    with pytest.raises(ConfigError, match="5 slots of a cache of 4"):
        cache.place(*rows(2, 2))
    assert cache.length == 3
    assert cache.cos[:, 0].tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(("move", "count"), [("advance", 3), ("advance", -1), ("rewind", 3), ("rewind", -1)])
def test_moves_beyond_the_ends_are_caught(move, count):
    """Catches a length below 0 or beyond the capacity, which engines would read memory by."""
    cache = KVCache(fake_model().decoder, 4)
    cache.advance(2)
    with pytest.raises(AssertionError):
        getattr(cache, move)(count)
    assert cache.length == 2


def test_engines_read_the_length_in_place():
    """Catches a length array that is replaced: graphs that were bound to it would read the old one forever."""
    cache = KVCache(fake_model().decoder, 4)
    bound = cache.past_length
    cache.advance(3)
    cache.rewind(1)
    assert bound is cache.past_length
    assert (bound.dtype, bound.shape, int(bound)) == (np.int32, (), 2)


def test_a_view_shows_the_slots_in_use():
    """Catches a view that copies (writes would be lost) or that shows free slots."""
    cache = KVCache(fake_model().decoder, 4)
    cache.advance(3)
    keys, values = cache.view(0)
    assert keys.shape == values.shape == (1, 2, 3, 8)
    assert np.shares_memory(keys, cache.keys[0])
    assert np.shares_memory(values, cache.values[0])
    assert not np.shares_memory(keys, values)


def test_memory_is_lent_again_once_nobody_looks_at_it():
    """Catches a view whose numbers change under it, and memory that is asked of the system for every cache."""
    spare, model = Spare(), fake_model().decoder
    cache = KVCache(model, 40, spare)
    address, view = cache.keys[0].ctypes.data, cache.values[0][:, :, 3:5]
    view[:] = 7
    del cache
    other = KVCache(model, 40, spare)
    assert not any(np.shares_memory(view, part) for part in (*other.keys, *other.values))
    assert (view == 7).all()
    del view
    assert KVCache(model, 40, spare).keys[0].ctypes.data == address


@pytest.mark.parametrize(("capacity", "again"), [(20, True), (30, True), (40, True), (41, False), (19, False)])
def test_memory_serves_caches_of_about_its_size(capacity, again):
    """Catches slots behind the end of what was lent, and a long video's memory that is kept for short ones."""
    spare, model = Spare(), fake_model().decoder
    address = KVCache(model, 40, spare).keys[0].ctypes.data
    cache = KVCache(model, capacity, spare)
    assert (cache.keys[0].ctypes.data == address) == again
    for part in (*cache.keys, *cache.values):
        part[:] = 1  # all of it is there
    del cache
    spare.let_go()
    assert not spare._kept


def test_one_cache_is_kept_at_most():
    """Catches memory of every cache that there ever was."""
    spare, model = Spare(), fake_model().decoder
    caches = [KVCache(model, 40, spare) for _ in range(3)]
    assert not spare._kept
    caches.clear()
    assert len(spare._kept) == 1
