"""Keys and values kept in int8: how far they move, what they take, and that answers do not depend on when one asks."""

import numpy as np
import pytest
from bundles import QUESTION, QUICK, square
from fakes import fake_model

from vlrt.errors import ConfigError
from vlrt.kv_cache import KVCache
from vlrt.packed_cache import pack
from vlrt.runtime import Runtime


def filled(length=7, capacity=9):
    model = fake_model()
    cache = KVCache(model.decoder, capacity)
    random = np.random.default_rng(0)
    for part in (*cache.keys, *cache.values):
        part[:] = random.standard_normal(part.shape) * 10.0 ** random.integers(-3, 4, part.shape[:3])[..., None]
    half = model.decoder.head_dim // 2
    cache.place(*random.standard_normal((2, length, half)).astype(np.float32))
    cache.advance(length)
    return model, cache


def test_each_slot_is_rounded_by_its_own_largest_value():
    """Catches one scale for a layer: its small slots would become zeros."""
    model, cache = filled()
    cache.keys[0][:, :, 3] = 0
    back = KVCache(model.decoder, 8)
    pack(cache).unpack(back)
    assert back.length == 7
    np.testing.assert_array_equal(back.cos[:7], cache.cos[:7])
    np.testing.assert_array_equal(back.sin[:7], cache.sin[:7])
    for layer in range(model.decoder.num_layers):
        for ref, out in zip(cache.view(layer), back.view(layer), strict=True):
            step = np.abs(ref).max(axis=-1, keepdims=True) / 127
            assert (np.abs(out - ref) <= 0.5001 * step).all()


def test_packing_what_was_unpacked_changes_nothing():
    model, cache = filled()
    first, again = KVCache(model.decoder, 7), KVCache(model.decoder, 7)
    pack(cache).unpack(first)
    pack(first).unpack(again)
    for a, b in zip([*first.keys, *first.values], [*again.keys, *again.values], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_answers_do_not_depend_on_when_one_asks_and_less_is_kept(make_bundle):
    path = make_bundle(overrides=QUICK)
    others = [f"What moves at second {i}?" for i in range(2)]
    kept = {}
    for kind in ("fp32", "int8"):
        with Runtime.open(path, threads=1, kv_cache=kind) as runtime, runtime.open_video(square()) as clip:
            fresh = runtime.ask(square(), QUESTION, max_tokens=6, min_tokens=6)
            for other in others:
                clip.ask(other, max_tokens=3)
            again = clip.ask(QUESTION, max_tokens=6, min_tokens=6)
            remembered = runtime.ask(square(), QUESTION, max_tokens=6, min_tokens=6)
            assert again.token_ids == fresh.token_ids == remembered.token_ids
            np.testing.assert_allclose(again.latents, fresh.latents, rtol=1e-4, atol=1e-5)
            assert fresh.usage.reused_tokens == 0
            assert remembered.usage.reused_tokens > 0
            tokens = clip._memory._tokens.nbytes
            kept[kind] = clip._memory.num_bytes - tokens, again.latents
    assert kept["int8"][0] < 0.4 * kept["fp32"][0]
    assert not np.array_equal(kept["int8"][1], kept["fp32"][1]), "nothing was rounded"
    np.testing.assert_allclose(kept["int8"][1], kept["fp32"][1], atol=0.05 * np.abs(kept["fp32"][1]).max())


def test_an_unknown_kind_is_refused(make_bundle):
    with pytest.raises(ConfigError, match="accepted: 'fp32', 'int8'"):
        Runtime.open(make_bundle(overrides=QUICK), kv_cache="int4")
