"""Positions and rotary tables against restatements of Qwen's rules and against transformers' own functions."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import vision_utils
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as hf
from transformers.models.qwen2_vl import modeling_qwen2_vl as hf2

from vlrt import positions
from vlrt.config import Decoder, Vision
from vlrt.errors import ConfigError

ULP = np.finfo(np.float32).eps


@dataclass(frozen=True)
class Span:
    is_image: bool
    start: int
    grid_thw: tuple[int, int, int]
    seconds_per_temporal_patch: float


def a_vision(**overrides):
    sizes = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64}
    return Vision(**{**sizes, "hidden_act": "silu", "window_size": 112, "tokens_per_second": 2, **overrides})


def a_decoder(head_dim, section, theta=1e6):
    return Decoder(64, 64, 1, 1, 1, head_dim, 100, section, rope_theta=theta)


def original_rule(num_tokens, spans, tokens_per_second, merge):
    """Qwen's own get_rope_index, token by token: text resumes at the largest position so far + 1."""
    rows, cursor = [], 0
    queue = {span.start: span for span in spans}
    index = 0
    while index < num_tokens:
        span = queue.get(index)
        if span is None:
            rows.append((cursor, cursor, cursor))
            cursor += 1
            index += 1
            continue
        frames, height, width = span.grid_thw
        block = []
        for frame in range(frames):
            if span.is_image:
                time = 0
            elif tokens_per_second is None:
                time = frame
            else:  # a float32 tensor of seconds times an integer range, then times the rate
                scaled = np.float32(np.float32(frame) * np.float32(span.seconds_per_temporal_patch))
                time = math.floor(np.float32(scaled * np.float32(tokens_per_second)))
            corners = [(row, column) for row in range(height // merge) for column in range(width // merge)]
            block += [(cursor + time, cursor + row, cursor + column) for row, column in corners]
        rows += block
        cursor = max(max(row) for row in block) + 1
        index += len(block)
    return np.array(rows, dtype=np.int64).reshape(-1, 3).T, cursor


grids = st.tuples(st.integers(1, 9), st.integers(1, 7), st.integers(1, 7)).map(lambda g: (g[0], 2 * g[1], 2 * g[2]))
seconds = st.one_of(st.sampled_from([1.0, 0.5, 2 / 3, 1 / 30, 0.0, 33.3]), st.floats(0, 50))


@st.composite
def sequences(draw):
    """Text and spans in turn -> (number of tokens, spans)."""
    spans, length = [], draw(st.integers(0, 5))
    for _ in range(draw(st.integers(0, 4))):
        is_image = draw(st.booleans())
        time, height, width = draw(grids)
        grid = (1 if is_image else time, height, width)
        spans.append(Span(is_image, length, grid, draw(seconds)))
        length += math.prod(grid) // 4 + draw(st.integers(1, 5))
    return length, spans


def token_types(num_tokens, spans):
    types = torch.zeros(1, num_tokens, dtype=torch.int)
    for span in spans:
        types[0, span.start : span.start + math.prod(span.grid_thw) // 4] = 1 if span.is_image else 2
    return types


def grids_of(spans, is_image):
    found = [span.grid_thw for span in spans if span.is_image == is_image]
    return torch.tensor(found) if found else None


@settings(max_examples=150, deadline=None)
@given(sequences(), st.sampled_from([None, 1, 2, 4, 25, 2.5]))
def test_largest_follows_qwens_own_rule(sequence, tokens_per_second):
    """Catches text that overlaps a video's times, seconds floored too early, images given a time."""
    num_tokens, spans = sequence
    out, after = positions.mrope_positions(
        np.zeros(num_tokens, np.int64), spans, tokens_per_second=tokens_per_second, rule="largest"
    )
    ref, ref_after = original_rule(num_tokens, spans, tokens_per_second, 2)
    np.testing.assert_array_equal(out, ref)
    assert (out.dtype, after) == (np.int64, ref_after)


@settings(max_examples=60, deadline=None)
@given(sequences(), st.sampled_from([2, 4]))
def test_spatial_follows_transformers(sequence, tokens_per_second):
    """Catches drift from the rule that checkpoints tuned under transformers 5.3 to 5.23 were trained with."""
    num_tokens, spans = sequence
    if not num_tokens:
        return
    out, after = positions.mrope_positions(
        np.zeros(num_tokens, np.int64), spans, tokens_per_second=tokens_per_second, rule="spatial"
    )
    config = hf.Qwen2_5_VLConfig(vision_config={"tokens_per_second": tokens_per_second, "spatial_merge_size": 2})
    owner = type(
        "Owner", (), {"config": config, "get_vision_position_ids": hf.Qwen2_5_VLModel.get_vision_position_ids}
    )()
    times = [span.seconds_per_temporal_patch for span in spans if not span.is_image]
    ref, _ = hf.Qwen2_5_VLModel.get_rope_index(
        owner,
        torch.zeros(1, num_tokens, dtype=torch.long),
        token_types(num_tokens, spans),
        image_grid_thw=grids_of(spans, True),
        video_grid_thw=grids_of(spans, False),
        second_per_grid_ts=torch.tensor(times, dtype=torch.float32) if times else None,
    )
    np.testing.assert_array_equal(out, ref[:, 0].numpy())
    if not spans or spans[-1].start + math.prod(spans[-1].grid_thw) // 4 < num_tokens:
        assert after == out[0, -1] + 1  # the sequence ends in text: the next token goes on from it


def test_seconds_stay_fractional_until_the_product():
    """Catches truncating 0.6 s to 0 (transformers before PR 48669), which puts every frame at one time."""
    spans = [Span(False, 0, (4, 2, 2), 0.6)]
    out, after = positions.mrope_positions(np.zeros(5, np.int64), spans, tokens_per_second=2)
    assert out[0].tolist() == [0, 1, 2, 3, 4]
    assert after == 5


def test_text_alone_counts_up():
    """Catches an empty span list, or an empty sequence, that fails."""
    out, after = positions.mrope_positions(np.zeros(3, np.int64), [], tokens_per_second=2)
    assert out.tolist() == [[0, 1, 2]] * 3
    assert after == 3
    assert positions.mrope_positions(np.zeros(0, np.int64), [], tokens_per_second=2)[1] == 0


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([Span(False, 3, (2, 4, 4), 1.0)], "sequence of 10"),
        ([Span(False, 0, (1, 4, 4), 1.0), Span(True, 2, (1, 2, 2), 1.0)], "a start from 4"),
        ([Span(False, 0, (1, 3, 4), 1.0)], r"grid_thw is \[1, 3, 4\]"),
        ([Span(False, 0, (0, 4, 4), 1.0)], "1 or more per axis"),
        ([Span(False, 0, (2, 2, 2), math.nan)], "seconds per temporal patch"),
        ([Span(False, 0, (2, 2, 2), -1.0)], "seconds per temporal patch"),
        ([Span(False, 0, (2, 2, 2), 1e30)], "seconds per temporal patch"),
    ],
)
def test_spans_that_cannot_be_are_refused(spans, message):
    """Catches positions written over other tokens, or garbage times, without a word."""
    with pytest.raises(ConfigError, match=message):
        positions.mrope_positions(np.zeros(10, np.int64), spans, tokens_per_second=2)


def test_an_unknown_rule_is_refused():
    """Catches a misspelled rule that falls through to one of the two."""
    with pytest.raises(ConfigError, match="accepted: 'largest', 'spatial'"):
        positions.mrope_positions(np.zeros(1, np.int64), [], tokens_per_second=2, rule="widest")


def within_ulps(out, ref, angles):
    """One ulp of the angle (frequencies may round the other way) and one of the value."""
    assert out.dtype == np.float32
    assert out.shape == ref.shape
    assert (np.abs(out - ref) <= 1.5 * ULP + 1.5 * ULP * np.abs(angles)).all()


@pytest.mark.parametrize(
    ("head_dim", "section", "theta"),
    [
        (128, (16, 24, 24), 1e6),
        (64, (8, 12, 12), 1e6),
        (32, (4, 6, 6), 1e6),
        (16, (2, 3, 3), 1e4),
        (10, (1, 1, 3), 5e5),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 63, 777])
def test_decoder_tables_equal_transformers(head_dim, section, theta, num_tokens):
    """Catches sections on the wrong axes, doubled sections and another order of rounding."""
    decoder = a_decoder(head_dim, section, theta)
    rope = {"rope_type": "default", "rope_theta": theta, "mrope_section": list(section)}
    config = hf.Qwen2_5_VLTextConfig(
        hidden_size=head_dim, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope
    )
    where = np.random.default_rng(0).integers(0, 30_000, (3, num_tokens))
    out = positions.mrope_cos_sin(where, decoder)
    ref = hf.Qwen2_5_VLRotaryEmbedding(config)(torch.zeros(1), torch.from_numpy(where)[:, None])
    angles = np.repeat(where, section, axis=0).T  # at most: frequencies are below 1
    for ours, theirs in zip(out, ref, strict=True):
        within_ulps(ours, theirs[0, :, : head_dim // 2].numpy(), angles)


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 2, 14), (2, 10, 6), (1, 62, 34)])
@pytest.mark.parametrize("head_dim", [80, 16, 40])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_vision_tables_equal_transformers(grid, head_dim, family):
    """Catches raster order instead of merge-window order, and rows swapped with columns."""
    vision = a_vision(hidden_size=2 * head_dim)
    config = {
        "qwen2_vl": lambda: hf2.Qwen2VLVisionConfig(embed_dim=2 * head_dim, num_heads=2, head_dim=head_dim),
        "qwen2_5_vl": lambda: hf.Qwen2_5_VLVisionConfig(hidden_size=2 * head_dim, num_heads=2),
    }[family]()
    rotary = {"qwen2_vl": hf2.Qwen2VLVisionRotaryEmbedding, "qwen2_5_vl": hf.Qwen2_5_VLVisionRotaryEmbedding}[family](
        config
    )
    where = vision_utils.get_vision_position_ids(torch.tensor([grid]), 2)
    for ours, theirs in zip(positions.vision_cos_sin(grid, vision), rotary(torch.zeros(1), where), strict=True):
        within_ulps(ours, theirs[:, : head_dim // 2].numpy(), np.float32(max(grid)))


@settings(max_examples=60, deadline=None)
@given(grids, st.sampled_from([28, 56, 112]))
def test_windows_equal_transformers(grid, window_size):
    """Catches windows that cross frames, empty windows kept, and ragged edges in the wrong order."""
    vision = a_vision(window_size=window_size)
    index, cu_seqlens = positions.window_index(grid, vision)
    ref_index, ref_cu = vision_utils.get_vision_window_index(torch.tensor([grid]), 2, window_size, 14)
    np.testing.assert_array_equal(index, ref_index.numpy())
    np.testing.assert_array_equal(cu_seqlens, ref_cu.numpy())
    assert (index.dtype, cu_seqlens.dtype) == (np.int64, np.int32)


@settings(max_examples=30, deadline=None)
@given(grids)
def test_frame_seqlens_equal_transformers(grid):
    """Catches attention across temporal patches."""
    out = positions.frame_seqlens(grid)
    np.testing.assert_array_equal(out, vision_utils.get_vision_cu_seqlens(torch.tensor([grid])).numpy())
    assert out.dtype == np.int32


def test_a_tower_without_windows_keeps_its_order():
    """Catches a division by zero, or a permutation, for Qwen2-VL."""
    vision = a_vision(window_size=0)
    index, cu_seqlens = positions.window_index((3, 4, 6), vision)
    assert index.tolist() == list(range(18))
    np.testing.assert_array_equal(cu_seqlens, positions.frame_seqlens((3, 4, 6)))
