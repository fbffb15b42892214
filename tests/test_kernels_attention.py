"""The attention kernels, interpreted, held against their specification in fp64. On GPUs: the cases of benches/."""

import math

import pytest
import torch

from tests.closeness import assert_close
from tests.interpreter import interpreted
from vlrt.kernels import reference

HEAD_DIMS = [64, 72, 80, 96, 128]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def tables(length, head_dim, dtype):
    inv_freq = 10_000.0 ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = (torch.arange(length, dtype=torch.float64) * 3 % 41)[:, None] * inv_freq
    return angles.cos().to(dtype), angles.sin().to(dtype)


class Video:
    """Random arguments of `video_attention_`: caches hold `past` older slots, and NaN everywhere else."""

    def __init__(self, past, num_new, *, head_dim=64, groups=2, num_kv_heads=2, batch=1, dtype=torch.float32, spare=9):
        self.past, self.num_new, self.dtype = past, num_new, dtype
        capacity = past + num_new + spare
        num_heads = num_kv_heads * groups
        # Thirds of one projection, shifted by one token: neither contiguous nor at offset 0.
        width = (num_heads + 2 * num_kv_heads) * head_dim
        qkv = random(batch, num_new + 1, width, dtype=dtype)[:, 1:]
        parts = qkv.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=-1)
        self.q, self.k, self.v = (part.unflatten(-1, (-1, head_dim)) for part in parts)
        self.cos, self.sin = tables(capacity, head_dim, dtype)
        self.caches = []
        for seed in (1, 2):
            cache = torch.full((batch, num_kv_heads, capacity, head_dim), math.nan, dtype=dtype)
            cache[:, :, :past] = random(batch, num_kv_heads, past, head_dim, seed=seed, dtype=dtype)
            self.caches.append(cache)
        self.length = torch.tensor(past, dtype=torch.int32)

    def given(self, dtype):
        copies = (x.to(dtype, copy=True) for x in (self.cos, self.sin, *self.caches))
        return [*(x.to(dtype) for x in (self.q, self.k, self.v)), *copies, self.length]

    def check(self, launcher, **kwargs):
        """Hold out and both caches of a launcher against the reference in fp64 and in its own dtype."""
        exact, plain = self.given(torch.float64), self.given(self.dtype)
        exact_out, plain_out = reference.video_attention_(*exact), reference.video_attention_(*plain)
        caches = [cache.clone() for cache in self.caches]
        out = launcher(self.q, self.k, self.v, self.cos, self.sin, *caches, self.length, **kwargs)
        assert_close(out, exact_out, plain_out)
        assert out.is_contiguous()
        new = slice(self.past, self.past + self.num_new)
        for cache, given, exact_cache, plain_cache in zip(caches, self.caches, exact[5:7], plain[5:7], strict=True):
            assert_close(cache[:, :, new], exact_cache[:, :, new], plain_cache[:, :, new])
            assert torch.equal(cache[:, :, : self.past], given[:, :, : self.past])
            assert cache[:, :, self.past + self.num_new :].isnan().all()


def launchers():
    """Return the launchers of `video_attention_` by name; triton loads here, in the interpreter's process alone."""
    from vlrt.kernels import decode_attention, video_attention

    return {
        "chosen": video_attention.video_attention_,
        "prefill": video_attention.prefill_attention,
        "decode": decode_attention.decode_attention,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("num_new", [3, 63])
@interpreted
def test_video_attention_of_every_head_dim(num_new, head_dim, dtype):
    """Catches pieces of the head dim that are lost, doubled or rotated by another column's angle."""
    Video(37, num_new, head_dim=head_dim, dtype=dtype).check(launchers()["chosen"])


@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(("past", "num_new"), [(0, 1), (0, 63), (0, 123), (1, 33), (127, 65), (300, 1), (333, 40)])
@interpreted
def test_prefill_of_odd_lengths(past, num_new, groups):
    """Catches masks off by one at the diagonal, at block edges and at the end, and heads in the wrong groups."""
    Video(past, num_new, groups=groups, num_kv_heads=1, dtype=torch.bfloat16).check(launchers()["prefill"])


@pytest.mark.parametrize("head_dim", [72, 96, 128])
@interpreted
def test_prefill_by_the_copy_engine(head_dim):
    """Catches descriptors of another cache row, or of columns beyond the head dim."""
    from vlrt.kernels import configs

    lookup = configs.lookup
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(configs, "lookup", lambda *key: {**lookup(*key), "TMA": 1})
        Video(200, 40, head_dim=head_dim, batch=2, dtype=torch.bfloat16).check(launchers()["prefill"])


@pytest.mark.parametrize("num_splits", [1, 3, 8])
@pytest.mark.parametrize("groups", [1, 2, 7])
@pytest.mark.parametrize(("past", "num_new"), [(0, 1), (0, 32), (1, 1), (63, 1), (64, 2), (123, 32), (777, 5)])
@interpreted
def test_decode_of_odd_lengths_and_splits(past, num_new, groups, num_splits):
    """Catches splits that overlap, miss keys, are empty or see the future, and new slots on a split's edge."""
    Video(past, num_new, groups=groups, num_kv_heads=1, dtype=torch.bfloat16).check(
        launchers()["decode"], num_splits=num_splits
    )


@pytest.mark.parametrize("num_new", [2, 40])
@interpreted
def test_samples_of_a_batch_and_heads_stay_apart(num_new):
    """Catches strides of the batch or the heads that are left out."""
    Video(20, num_new, num_kv_heads=2, batch=2, dtype=torch.bfloat16).check(launchers()["chosen"])


@pytest.mark.parametrize("num_new", [1, 33])
@interpreted
def test_the_functional_op_copies_its_caches(num_new):
    """Catches a functional op that writes to what it was given, which torch.compile takes for unchanged."""
    from vlrt.kernels import video_attention

    video = Video(5, num_new)
    given = video.given(torch.float32)
    out, *caches = video_attention.video_attention(*given)
    for cache, before in zip(given[5:7], video.caches, strict=True):
        assert torch.equal(cache.nan_to_num(), before.nan_to_num())
    for x, ref in zip((out, *caches), reference.video_attention(*given), strict=True):
        assert_close(x.nan_to_num(), ref.nan_to_num())


@interpreted
def test_decoding_a_full_cache():
    """Catches reads and writes past the last slot."""
    Video(63, 1, spare=0).check(launchers()["chosen"])
    Video(31, 33, spare=0).check(launchers()["chosen"])


@pytest.mark.parametrize("op", ["append", "video_attention", "decode_attention", "segment_attention"])
def test_every_shape_has_a_config(op):
    """Catches a card, dtype, head dim or length for which an op's file has no row."""
    from vlrt.kernels import configs

    for arch in configs.ARCHITECTURES:
        for dtype in DTYPES:
            for head_dim in HEAD_DIMS:
                for length in (1, 63, 1000, 1_000_000):
                    assert configs.lookup(op, arch, dtype, head_dim, length)["num_warps"] in (4, 8)


class Segments:
    """Random arguments of `segment_attention`, q, k and v thirds of one projection."""

    def __init__(self, lengths, *, head_dim=64, num_heads=2, dtype=torch.float32):
        total = sum(lengths)
        qkv = random(total + 1, 3 * num_heads * head_dim, dtype=dtype)[1:]
        self.qkv = [part.unflatten(-1, (num_heads, head_dim)) for part in qkv.chunk(3, dim=-1)]
        self.tables = tables(total, head_dim, dtype)
        self.bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
        self.dtype = dtype

    def given(self, dtype):
        return [*(x.to(dtype) for x in (*self.qkv, *self.tables)), self.bounds]

    def check(self, out):
        exact, plain = (reference.segment_attention(*self.given(dtype)) for dtype in (torch.float64, self.dtype))
        assert_close(out, exact, plain)


def segment_attention(segments, *, keys_first=None):
    """Run the kernel, keys rotated first or while loaded; None: as the config says."""
    from vlrt.kernels import configs
    from vlrt.kernels import segment_attention as module

    lookup = configs.lookup
    with pytest.MonkeyPatch.context() as patch:
        if keys_first is not None:
            patch.setattr(configs, "lookup", lambda *key: {**lookup(*key), "ROTATE_KEYS_FIRST": keys_first})
        return module.segment_attention(*segments.given(segments.dtype))


@pytest.mark.parametrize("keys_first", [False, True])
@pytest.mark.parametrize("lengths", [[1], [63], [1, 1, 1], [4, 63, 1, 123], [64, 64, 16, 16], [63, 70], [130, 200]])
@interpreted
def test_segments_of_odd_lengths(lengths, keys_first):
    """Catches bounds off by one, tiles that meet several segments, and tokens that see their neighbours."""
    segments = Segments(lengths, dtype=torch.bfloat16)
    segments.check(segment_attention(segments, keys_first=keys_first))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@interpreted
def test_segments_of_every_head_dim(head_dim, dtype):
    """Catches pieces of the head dim that are lost, doubled or rotated by another column's angle."""
    for lengths in ([40, 25], [150]):
        segments = Segments(lengths, head_dim=head_dim, dtype=dtype)
        segments.check(segment_attention(segments))


@interpreted
def test_more_segments_than_are_read_at_a_time():
    """Catches a search that stops after the first block of bounds."""
    from vlrt.kernels import segment_attention as module

    segments = Segments([3] * 50, num_heads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK_BOUNDS", 16)
        segments.check(segment_attention(segments))


@interpreted
def test_empty_segments_hold_no_tokens():
    """Catches a search that is lost where two bounds are equal."""
    segments = Segments([20, 0, 0, 50, 0], num_heads=1)
    q, k, v, cos, sin, _ = segments.given(torch.float64)
    bounds = torch.tensor([0, 20, 70], dtype=torch.int32)
    out = segment_attention(segments)
    assert_close(out, reference.segment_attention(q, k, v, cos, sin, bounds))


@pytest.mark.parametrize("keys_first", [False, True])
@interpreted
def test_nothing_of_another_segment_arrives(keys_first):
    """Catches leaks that a comparison of small numbers may miss: NaN, times a weight of 0 too, is NaN."""
    segments = Segments([4, 63, 1, 60], num_heads=1)
    clean = segment_attention(segments, keys_first=keys_first)
    for x in segments.qkv:
        x[4:67] = math.nan
    out = segment_attention(segments, keys_first=keys_first)
    outside = torch.ones(128, dtype=torch.bool)
    outside[4:67] = False
    assert torch.equal(out[outside], clean[outside])
    assert out[4:67].isnan().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": lambda x: x[:, :1]}, r"k is \[1, 1, 2, 64\]"),
        ({"v": lambda x: x.double()}, "v is torch.float64"),
        ({"q": lambda x: x[..., :63]}, "head dims 64, 72"),
        ({"q": lambda x: x.double()}, "not torch.float64"),
        ({"q": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2)}, "last axis"),
        ({"past_length": lambda x: x.long()}, "int32 scalar"),
        ({"cos": lambda x: x[:-1]}, r"cos is \[15, 32\]"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(change, words):
    """Catches a launcher that reads beyond a tensor, or another layout than it was given."""
    from vlrt.kernels import video_attention

    names = ("q", "k", "v", "cos", "sin", "k_cache", "v_cache", "past_length")
    given = dict(zip(names, Video(5, 2).given(torch.float32), strict=True))
    for name, spoil in change.items():
        given[name] = spoil(given[name])
    with pytest.raises(ValueError, match=words):
        video_attention.video_attention_(**given)
