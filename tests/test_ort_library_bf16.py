"""The level of libvlrt_ort whose products are in bf16: where it is taken, and how far it errs.

An error is judged by that of the same formula in PyTorch with queries, keys, values and weights rounded to bf16.
Skipped where the library cannot be built, and on processors without AMX.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.ort_ops import doubled, lane_bias, run, session, video_inputs
from vlrt import doctor
from vlrt.backends import ort_library
from vlrt.kernels import reference


@pytest.fixture
def coarse(library) -> str:
    """The level whose products are in bf16."""
    level = library.levels[ort_library.AUTO_BF16]
    if level == library.levels[ort_library.AUTO]:
        pytest.skip("this processor has no level with products in bf16")
    return level


def rounded(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().to(x.dtype)


def plain_attention(q: Any, k: Any, v: Any, mask: Any) -> torch.Tensor:
    """`reference.attention` with every operand of a product rounded to bf16."""
    groups = q.shape[2] // k.shape[2]
    k, v = (rounded(x).repeat_interleave(groups, dim=2).transpose(1, 2) for x in (k, v))
    scores = rounded(q * q.shape[-1] ** -0.5).transpose(1, 2) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (rounded(weights) @ v / weights.sum(-1, keepdim=True)).transpose(1, 2)


@pytest.fixture
def plain(monkeypatch):
    """The reference with `plain_attention` in place of its attention."""

    def run_plain(op: Any, given: Any) -> torch.Tensor:
        with monkeypatch.context() as patch:
            patch.setattr(reference, "attention", plain_attention)
            out = op(*given)
        return out[0] if isinstance(out, tuple) else out

    return run_plain


@pytest.mark.parametrize("past", [0, 5, 777])
@pytest.mark.parametrize("num_new", [64, 123])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "batch"),
    [(2, 2, 80, 2), (14, 2, 64, 1), (7, 1, 128, 1), (3, 1, 18, 1), (2, 1, 72, 1), (2, 2, 96, 1), (2, 1, 256, 1)],
)
def test_video_attention_errs_as_bf16_does(library, coarse, plain, num_new, past, heads, kv_heads, dim, batch):
    """Catches a key that is packed to the wrong place, padding that counts, and a mask that is off by one."""
    given = video_inputs(num_new, past, heads, kv_heads, dim, batch)
    exact = reference.video_attention(*doubled(given))
    out, *caches = run(session(library, "VideoAttention", coarse), *given)
    assert_close(out, exact[0], plain(reference.video_attention, given), torch.bfloat16)
    assert not torch.equal(out, run(session(library, "VideoAttention"), *given)[0]), "this was computed in fp32"
    used = slice(0, past + num_new)
    for cache, want, before in zip(caches, exact[1:], given[5:7], strict=True):
        assert_close(cache[:, :, used], want[:, :, used])
        assert torch.equal(cache[:, :, :past], before[:, :, :past])
        assert cache[:, :, past + num_new :].isnan().all()


@pytest.mark.parametrize(("num_new", "past"), [(64, 5), (123, 777), (16, 2600)])
def test_lane_attention_errs_as_bf16_does(library, coarse, plain, num_new, past):
    """Catches a bias that goes to another row or key, and hidden slots that count."""
    given = (*video_inputs(num_new, past, 14, 2, 64), lane_bias(num_new, past, first=past // 2))
    out = run(session(library, "LaneAttention", coarse), *given)[0]
    expected = plain(reference.video_attention, given)
    assert_close(out, reference.video_attention(*doubled(given))[0], expected, torch.bfloat16)


def test_a_long_cache_is_divided_among_tasks(library, coarse, plain):
    """Catches a part that begins within a packed block, and parts that are merged without regard to their maxima."""
    given = list(video_inputs(11, 4999, 7, 1, 64))
    given[5][:, :, 3000:3010] *= 8
    exact = reference.video_attention(*doubled(tuple(given)))[0]
    out = run(session(library, "VideoAttention", coarse), *given)[0]
    assert_close(out, exact, plain(reference.video_attention, given), torch.bfloat16)


@pytest.mark.parametrize("scale", [1e-20, 30, 1000])
def test_extreme_scores_stay_finite(library, coarse, scale):
    """Catches weights that overflow, and rows whose weights all vanish: a row lies between the values that it sees."""
    given = list(video_inputs(123, 300, 2, 1, 64))
    q, k, v = given[:3]
    q *= scale
    k *= scale
    out = run(session(library, "VideoAttention", coarse), *given)[0]
    seen = rounded(torch.cat([given[6][0, 0, :300], v[0, :, 0]]))
    margin = 2**-8 * seen.abs().max()  # of weights that are rounded
    assert out.isfinite().all()
    assert (out >= seen.amin(0) - margin).all()
    assert (out <= seen.amax(0) + margin).all()


def test_what_all_keys_share_is_not_rounded(library, coarse, plain):
    """Catches keys that lose their difference to a large bias, which key projections of the Qwen family have."""
    given = list(video_inputs(123, 300, 2, 1, 64))
    given[3], given[4] = torch.ones_like(given[3]), torch.zeros_like(given[4])  # else rotary spreads the bias
    expected = plain(reference.video_attention, given)
    given[1] = given[1] + 256
    given[5] = given[5] + 256
    exact = reference.video_attention(*doubled(tuple(given)))[0]
    assert_close(run(session(library, "VideoAttention", coarse), *given)[0], exact, expected, torch.bfloat16)


@pytest.mark.parametrize(
    ("bounds", "heads", "dim"),
    [
        ([0, 256, 512], 8, 80),
        ([0, 63, 63, 64, 187], 2, 64),
        ([0, 7, 777], 3, 128),
        ([0, 64, 128, 200], 2, 40),
        ([0, 5, 1099, 1100, 2300], 2, 72),
        (list(range(0, 1345, 64)), 4, 80),
    ],
)
def test_segment_attention_errs_as_bf16_does(library, coarse, plain, bounds, heads, dim):
    """Catches short segments, which stay in fp32, and long ones that take each other's keys."""
    generator = torch.Generator().manual_seed(bounds[-1])
    q, k, v = (torch.randn(bounds[-1], heads, dim, generator=generator) for _ in range(3))
    angles = 3 * torch.randn(bounds[-1], dim // 2, generator=generator)
    given = (q, k, v, angles.cos(), angles.sin(), torch.tensor(bounds, dtype=torch.int32))
    distinct = (*given[:5], torch.unique(given[5]))
    exact = reference.segment_attention(*doubled(distinct))
    out = run(session(library, "SegmentAttention", coarse), *given)[0]
    assert_close(out, exact, plain(reference.segment_attention, distinct), torch.bfloat16)


def test_few_queries_stay_in_fp32(library, coarse):
    """Catches a cache that is packed for the sake of one position."""
    given = video_inputs(4, 777, 14, 2, 64)
    ours, fp32 = (run(session(library, "VideoAttention", level), *given)[0] for level in (coarse, "auto"))
    assert torch.equal(ours, fp32)


def test_what_is_no_number_stays_so(library, coarse):
    """Catches a NaN that a maximum or the packing swallows."""
    given = list(video_inputs(123, 63, 2, 1, 64))
    given[5][0, 0, 7, 3] = torch.nan
    assert run(session(library, "VideoAttention", coarse), *given)[0].isnan().all()


def test_threads_change_nothing(library, coarse):
    """Catches a tile register or scratch memory that two tasks share."""
    given = video_inputs(123, 777, 14, 2, 64)
    ones, fours = (run(session(library, "VideoAttention", coarse, threads=n), *given)[0] for n in (1, 4))
    assert torch.equal(ones, fours)


def test_fp32_is_what_is_taken_unasked(library):
    """Catches a level with products in bf16 in sessions that did not allow it."""
    assert library.levels[ort_library.AUTO] in ("avx512", "avx2", "plain", "neon")


def test_the_doctor_names_both_levels(library, monkeypatch):
    """Catches a machine whose bf16 is not said to be used."""
    monkeypatch.setattr(ort_library, "DIRECTORY", library.path.parent)
    (row,) = (row for row in doctor.abilities() if row.name == "libvlrt_ort")
    assert set(library.levels.values()) <= set(row.reason.replace(";", " ").split())


def test_exponentials_of_weights_are_near_enough(library, coarse):
    """Catches an approximation of 2^x that errs by more than a weight's rounding: values of one key against many."""
    given = list(video_inputs(64, 0, 1, 1, 32))
    given[2] = torch.ones_like(given[2])  # then each row is the ratio of the weights' sum to itself
    out = run(session(library, "VideoAttention", coarse), *given)[0].numpy()
    assert np.abs(out - 1).max() <= 2**-8
