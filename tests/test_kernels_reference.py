"""The specification of the ops, held in fp64 against what must be true of them and against PyTorch's own functions."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional

from tests.closeness import assert_close
from vlrt.kernels import reference

SIZES = [1, 63, 123]
LOW = [torch.float32, torch.bfloat16]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(where, head_dim):
    """Tables cos and sin [S, D/2] in fp64 of positions [S], by the formula of RoFormer."""
    inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.as_tensor(where, dtype=torch.float64)[:, None] * inv_freq
    return angles.cos(), angles.sin()


def by_complex_numbers(x, where):
    """Rotary as RoFormer states it: the pair (j, j + D/2) is a complex number that turns by position * frequency j."""
    half = x.shape[-1] // 2
    cos, sin = tables(where, x.shape[-1])
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.complex(cos, sin)[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("length", SIZES)
def test_rotary_turns_pairs_and_keeps_their_norms(length):
    """Catches interleaved pairs in place of halves, a sign error, and tables read along the wrong axis."""
    x = random(2, length, 3, 16)
    out = reference.rotary(x, *tables(range(length), 16))
    assert_close(out, by_complex_numbers(x, range(length)))
    assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_rotary_makes_products_depend_on_distance_alone():
    """Catches a rotation whose queries and keys do not turn the same way."""
    q, k = random(1, 1, 63, 16), random(1, 1, 63, 16, seed=1)

    def products(m, n):
        return (reference.rotary(q, *tables([m], 16)) * reference.rotary(k, *tables([n], 16))).sum(-1)

    by_hand = (by_complex_numbers(q, [1007]) * by_complex_numbers(k, [1000])).sum(-1)  # as far from 0: as inexact
    assert_close(products(1007, 1000), products(7, 0), by_hand)
    assert not torch.allclose(products(8, 0), products(7, 0))


@pytest.mark.parametrize("heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("length", SIZES)
def test_grouped_heads_equal_repeated_heads(heads, length):
    """Catches groups laid out the other way (head h must read key head h // groups), and a wrong scale."""
    num_heads, num_kv_heads = heads
    q = random(2, length, num_heads, 8)
    k, v = (random(2, length + 2, num_kv_heads, 8, seed=seed) for seed in (1, 2))
    for mask in (None, torch.ones(length, length + 2, dtype=torch.bool).tril(2)):
        out = reference.attention(q, k, v, mask)
        for head in range(num_heads):
            at = head // (num_heads // num_kv_heads)
            scores = torch.einsum("bsd,bkd->bsk", q[:, :, head], k[:, :, at]) / math.sqrt(8)
            if mask is not None:
                scores = scores.where(mask, -math.inf)
            assert_close(out[:, :, head], torch.einsum("bsk,bkd->bsd", scores.softmax(-1), v[:, :, at]))


class Sequence:
    """One random sequence, and `video_attention` over pieces of it."""

    def __init__(self, length, *, capacity, num_heads=4, num_kv_heads=2, head_dim=16, batch=2, dtype=torch.float64):
        shapes = {"q": num_heads, "k": num_kv_heads, "v": num_kv_heads}
        self.q, self.k, self.v = (
            random(batch, length, heads, head_dim, seed=seed, dtype=dtype) for seed, heads in enumerate(shapes.values())
        )
        where = torch.arange(capacity) * 3 % 41  # as with M-RoPE, a slot's position is not its index
        self.cos, self.sin = (table.to(dtype) for table in tables(where, head_dim))
        self.caches = [torch.full((batch, num_kv_heads, capacity, head_dim), math.nan, dtype=dtype) for _ in range(2)]

    def run(self, start, stop, *, past=None):
        """Append tokens start .. stop at slot `past` (default: start)."""
        piece = (x[:, start:stop] for x in (self.q, self.k, self.v))
        at = torch.tensor(start if past is None else past, dtype=torch.int32)
        out, *self.caches = reference.video_attention(*piece, self.cos, self.sin, *self.caches, at)
        return out

    def dense(self):
        """The whole sequence by PyTorch's own attention, without a cache."""
        length = self.q.shape[1]
        q, k = (reference.rotary(x, self.cos[:length], self.sin[:length]) for x in (self.q, self.k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, self.v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


@pytest.mark.parametrize("length", SIZES)
def test_video_attention_equals_dense_causal_attention(length):
    """Catches a mask off by one, keys left unrotated or rotated by another row, and heads in the wrong groups."""
    sequence = Sequence(length, capacity=length + 5)
    assert_close(sequence.run(0, length), sequence.dense())


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("length", SIZES)
def test_video_attention_in_low_precision(length, dtype):
    """Catches a specification that itself loses precision where kernels are held against it."""
    exact = Sequence(length, capacity=length).dense()
    low = Sequence(length, capacity=length, dtype=dtype)
    assert_close(low.run(0, length), exact, low.dense())


@pytest.mark.parametrize("bounds", [(0, 1, 2, 3, 63), (0, 62, 63), (0, 32, 63), (0, *range(30, 64))])
def test_video_attention_in_pieces_equals_one_pass(bounds):
    """Catches a chunked prefill, or steps after it, that see too few, too many or wrongly placed keys."""
    whole, pieces = Sequence(63, capacity=70), Sequence(63, capacity=70)
    exact = whole.run(0, 63)
    out = torch.cat([pieces.run(*piece) for piece in pairwise(bounds)], dim=1)
    assert_close(out, exact)
    for cache, ref in zip(pieces.caches, whole.caches, strict=True):
        assert_close(cache[:, :, :63], ref[:, :, :63])


def test_video_attention_after_a_rewind():
    """Catches keys of slots that were taken back: past_length alone says what is in use."""
    clean, rewound = Sequence(63, capacity=123), Sequence(63, capacity=123)
    exact = clean.run(0, 63)
    rewound.run(0, 40)
    rewound.run(0, 63, past=40)  # other tokens, further than the real ones will go
    assert_close(rewound.run(40, 63), exact[:, 40:])


@pytest.mark.parametrize(("past", "length"), [(0, 1), (0, 63), (7, 1), (60, 63)])
def test_slots_outside_the_sequence_are_neither_read_nor_written(past, length):
    """Catches attention over stale slots, writes beyond the new ones, and inputs changed in place."""
    sequence = Sequence(past + length, capacity=130)
    if past:
        sequence.run(0, past)
    before = [cache.clone() for cache in sequence.caches]
    given = sequence.caches
    out = sequence.run(past, past + length)
    assert out.isfinite().all()
    for cache, ref, passed in zip(sequence.caches, before, given, strict=True):
        assert torch.equal(cache[:, :, :past], ref[:, :, :past])
        assert cache[:, :, past : past + length].isfinite().all()
        assert cache[:, :, past + length :].isnan().all()
        assert torch.equal(passed.nan_to_num(), ref.nan_to_num())


def a_segmented(lengths, *, dtype=torch.float64):
    total = sum(lengths)
    q, k, v = (random(total, 3, 16, seed=seed, dtype=dtype) for seed in range(3))
    cos, sin = (table.to(dtype) for table in tables(range(total), 16))
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    return q, k, v, cos, sin, bounds


def dense_masked(q, k, v, cos, sin, cu_seqlens):
    """Segment attention as PyTorch's own attention over everything, under a block-diagonal mask."""
    q, k = reference.rotary(q, cos, sin), reference.rotary(k, cos, sin)
    segment = torch.bucketize(torch.arange(len(q)), cu_seqlens[1:], right=True)
    mask = segment[:, None] == segment[None]
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(0, 1)


LENGTHS = [[1], [63], [1, 1, 1], [4, 63, 1, 123], [64, 64, 16, 16]]


@pytest.mark.parametrize("lengths", LENGTHS)
def test_segment_attention_equals_dense_masked_attention(lengths):
    """Catches bounds off by one, a causal mask where none belongs, and positions that restart per segment."""
    given = a_segmented(lengths)
    exact = dense_masked(*given)
    assert_close(reference.segment_attention(*given), exact)
    for dtype in LOW:
        low = a_segmented(lengths, dtype=dtype)
        assert_close(reference.segment_attention(*low), exact, dense_masked(*low))


@pytest.mark.parametrize("poisoned", range(4))
def test_tokens_of_other_segments_never_matter(poisoned):
    """Catches leaks between windows or temporal patches, which a comparison of small numbers may miss."""
    lengths = [4, 63, 1, 123]
    given = a_segmented(lengths)
    exact = reference.segment_attention(*given)
    start = sum(lengths[:poisoned])
    inside = slice(start, start + lengths[poisoned])
    for x in given[:3]:
        x[inside] = math.nan
    out = reference.segment_attention(*given)
    outside = torch.ones(sum(lengths), dtype=torch.bool)
    outside[inside] = False
    assert torch.equal(out[outside], exact[outside])
    assert out[inside].isnan().all()


@pytest.mark.parametrize("shape", [(1, 1), (63, 5), (2, 123, 16)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm_equals_pytorchs(shape, scale):
    """Catches eps outside the root, a mean over the wrong axis, and statistics in low precision."""
    x, weight = scale * random(*shape), random(shape[-1], seed=1)
    exact = functional.rms_norm(x, shape[-1:], weight, 1e-6)
    assert_close(reference.rms_norm(x, weight, 1e-6), exact)
    for dtype in LOW:
        plain = functional.rms_norm(x.to(dtype), shape[-1:], weight.to(dtype), 1e-6)
        assert_close(reference.rms_norm(x.to(dtype), weight.to(dtype), 1e-6), exact, plain)


class Injection:
    """Random arguments of `latent_injection`, and the formula of docs/latents.md written out by hand."""

    def __init__(self, *, latents=3, temporal=5, width=12, inner=7, num_heads=2, dtype=torch.float64):
        weights = {"norm_in": (width,), "fc1": (inner, width), "fc2": (width, inner), "q_proj": (width, width)}
        weights |= {"memory_k": (2, temporal, width), "memory_v": (2, temporal, width)}
        weights |= {"alpha": (), "norm_out": (width,), "rho": ()}
        shapes = {"h": (2, latents, width), **weights}
        self.given = {name: random(*shape, seed=i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
        self.num_heads, self.eps = num_heads, 1e-6

    def run(self):
        return reference.latent_injection(**self.given, num_heads=self.num_heads, eps=self.eps)

    def by_hand(self):
        g, out = self.given, torch.empty_like(self.given["h"])
        for sample in range(len(out)):
            for slot in range(out.shape[1]):
                u = self.norm(g["h"][sample, slot]) * g["norm_in"]
                inner = g["fc1"] @ u
                mixed = u + g["fc2"] @ (inner / (1 + torch.exp(-inner)))
                mixed = mixed + torch.tanh(g["alpha"]) * self.look_up(g["q_proj"] @ u, sample)
                out[sample, slot] = g["rho"] * self.norm(mixed) * g["norm_out"]
        return out

    def look_up(self, q, sample):
        size, parts = len(q) // self.num_heads, []
        for head in range(self.num_heads):
            own = slice(head * size, (head + 1) * size)
            k, v = (self.given[name][sample, :, own] for name in ("memory_k", "memory_v"))
            scores = torch.exp(k @ q[own] / math.sqrt(size))
            parts.append(scores / scores.sum() @ v)
        return torch.cat(parts)

    def norm(self, x):
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)


@pytest.mark.parametrize("temporal", SIZES)
@pytest.mark.parametrize("sizes", [{}, {"latents": 1, "num_heads": 1}, {"width": 63, "num_heads": 7, "inner": 123}])
def test_latent_injection_equals_the_formula_by_hand(sizes, temporal):
    """Catches any term lost or misplaced: heads mixed up, the gate inside the attention, a norm without its weight."""
    injection = Injection(temporal=temporal, **sizes)
    exact = injection.by_hand()
    assert_close(injection.run(), exact)
    for dtype in LOW:
        low = Injection(temporal=temporal, **sizes, dtype=dtype)
        assert_close(low.run(), exact, low.by_hand())


def test_a_fresh_injection_only_scales():
    """Catches a fresh module (fc2 = 0, alpha = 0) that is not z = rho * h / rms(h), or that reads the video."""
    injection = Injection()
    g = injection.given
    for name in ("fc2", "alpha"):
        g[name] = torch.zeros_like(g[name])
    for name in ("norm_in", "norm_out"):
        g[name] = torch.ones_like(g[name])
    injection.eps = 0.0  # or two norms in a row shrink a little more than one
    exact = g["rho"] * injection.norm(g["h"])
    assert_close(injection.run(), exact)
    g["memory_k"] = g["memory_k"] * 1e3
    assert_close(injection.run(), exact)


def test_a_closed_gate_and_an_empty_memory_give_the_same():
    """Catches a video that leaks through a gate of zero, and zeros (no video) that change a latent."""
    closed, empty, looking = Injection(), Injection(), Injection()
    closed.given["alpha"] = torch.zeros_like(closed.given["alpha"])
    empty.given["memory_k"], empty.given["memory_v"] = (torch.zeros(2, 1, 12, dtype=torch.float64) for _ in range(2))
    assert_close(empty.run(), closed.run())
    assert not torch.allclose(looking.run(), closed.run())


def test_latents_of_a_batch_do_not_mix():
    """Catches a slot or a sample that reads another's state: z_k may depend on h_k and its own video alone."""
    injection = Injection()
    exact = injection.run()
    injection.given["h"][0, 1] = math.nan
    injection.given["memory_v"][1] = math.nan
    out = injection.run()
    assert torch.equal(out[0, [0, 2]], exact[0, [0, 2]])
    assert out[0, 1].isnan().all()
    assert out[1].isnan().all()
