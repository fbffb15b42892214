"""Where tokens and patches stand: M-RoPE positions, rotary tables, and who attends to whom in the vision tower.

Pure NumPy, so that every backend gets the same tables as graph inputs. Knows grids and spans, no model and no file.

Angles are formed in float32 in the order that the models were trained with (position * inverse frequency). Powers,
cosines and sines are evaluated in float64 and rounded once, so that they do not depend on the machine's SIMD.

Sources: Qwen's `get_rope_index`, `get_window_index` and `rot_pos_emb` (Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, arXiv
2502.13923), restated.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from vlrt.config import Decoder, TextPosition, Vision
from vlrt.errors import ConfigError

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Grid = tuple[int, int, int]  # temporal, height, width, in patches

VISION_ROPE_THETA = 10_000.0


class SpanLike(Protocol):
    """What `mrope_positions` reads of a `prompt.Span`: one image or video among the tokens."""

    @property
    def is_image(self) -> bool:
        """Whether the span is a still image: its temporal axis stands at 0."""

    @property
    def start(self) -> int:
        """Index of its first pad token in the sequence."""

    @property
    def grid_thw(self) -> Grid:
        """Patches per axis."""

    @property
    def seconds_per_temporal_patch(self) -> float:
        """Seconds of video that one temporal patch covers, fractional."""


def mrope_positions(
    ids: Int64,
    spans: Sequence[SpanLike],
    *,
    tokens_per_second: float | None,
    spatial_merge_size: int = 2,
    rule: TextPosition = "largest",
) -> tuple[Int64, int]:
    """Return the M-RoPE positions of a sequence and the position of the token that would follow it.

    A temporal patch stands at floor(index * seconds_per_temporal_patch * tokens_per_second), multiplied left to right
    in float32 as Qwen2.5-VL's own code does, and floored only then.

    Args:
        ids: [S] int64; only its length is read.
        spans: images and videos in order of `start`; each covers t * h * w / spatial_merge_size**2 tokens.
        tokens_per_second: steps of the temporal axis per second; None counts temporal patches (Qwen2-VL).
        spatial_merge_size: patches per token and axis.
        rule: where text continues after a span: "largest" position on any axis + 1 (Qwen's own), or "spatial":
            start + max(height, width) in tokens (transformers 5.3 to 5.23).

    Returns:
        positions [3, S] int64 (time, height, width), and the next text position. Under "spatial" that is the one that
        a text token in the same sequence would get, as in training; transformers' `generate` skips to the largest + 1.

    Raises:
        ConfigError: spans overlap, are out of order or leave the sequence; a grid, a time or the rule is invalid.
    """
    if rule not in ("largest", "spatial"):
        raise ConfigError(f"text position rule is {rule!r}; accepted: 'largest', 'spatial'")
    positions = np.empty((3, len(ids)), dtype=np.int64)
    index, position = 0, 0
    for span in spans:
        size = _num_tokens(span.grid_thw, spatial_merge_size)
        if not index <= span.start <= len(ids) - size:
            raise ConfigError(
                f"span starts at token {span.start} and has {size}; accepted: a start from {index} (end of the span "
                f"before) to {len(ids) - size} (sequence of {len(ids)})"
            )
        position = _fill_text(positions[:, index : span.start], position)
        index = span.start + size
        block = _span_positions(span, tokens_per_second, spatial_merge_size)
        positions[:, span.start : index] = block + position
        _, height, width = span.grid_thw
        step = int(block.max()) + 1 if rule == "largest" else max(height, width) // spatial_merge_size
        position += step
    return positions, _fill_text(positions[:, index:], position)


def mrope_cos_sin(positions: Int64, decoder: Decoder) -> tuple[Float32, Float32]:
    """Return the decoder's rotary tables: cos and sin, each [S, head_dim / 2] float32.

    Frequency j reads the axis that `mrope_section` gives it: the first section time, then height, then width.

    Args:
        positions: [3, S] int64 from `mrope_positions`.
        decoder: gives head_dim, rope_theta and mrope_section.

    Raises:
        ConfigError: positions are not [3, S].
    """
    if positions.ndim != 2 or positions.shape[0] != 3:
        raise ConfigError(f"positions have shape {list(positions.shape)}; accepted: [3, S]")
    axis_of_frequency = np.repeat(np.arange(3), decoder.mrope_section)  # [head_dim / 2]
    inv_freq = _inverse_frequencies(decoder.head_dim, decoder.rope_theta)
    return _cos_sin(positions.astype(np.float32)[axis_of_frequency].T * inv_freq)


def vision_cos_sin(grid_thw: Grid, vision: Vision) -> tuple[Float32, Float32]:
    """Return the vision tower's rotary tables: cos and sin, each [n, head_dim / 2] float32, n = t * h * w patches.

    Rows come in the order of the preprocessor's patches: merge windows row by row, patches row by row within each. The
    first half of the columns turns with the patch's row, the second half with its column.

    Raises:
        ConfigError: the grid does not divide into merge windows.
    """
    time, height, width = _checked(grid_thw, vision.spatial_merge_size)
    merge = vision.spatial_merge_size
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    windows = (height // merge, merge, width // merge, merge)
    in_order = [axis.reshape(windows).transpose(0, 2, 1, 3).reshape(-1) for axis in (rows, columns)]
    inv_freq = _inverse_frequencies(vision.head_dim // 2, VISION_ROPE_THETA)  # [head_dim / 4]
    cos, sin = _cos_sin(np.arange(max(height, width), dtype=np.float32)[:, None] * inv_freq)
    tables = [np.concatenate([table[axis] for axis in in_order], axis=1) for table in (cos, sin)]
    return np.tile(tables[0], (time, 1)), np.tile(tables[1], (time, 1))


def window_index(grid_thw: Grid, vision: Vision) -> tuple[Int64, Int32]:
    """Return the order in which tokens enter window attention, and where the windows end.

    Windows are `window_size` pixels square and cut at the lower and right edge; they never cross temporal patches.
    A tower without windows (window_size 0) keeps its order, with one window per temporal patch.

    Returns:
        index [n / merge**2] int64: position i of the window order holds token index[i] (merge**2 patches each).
        cu_window_seqlens [windows + 1] int32: cumulative lengths in patches; every window has at least one token.

    Raises:
        ConfigError: the grid does not divide into merge windows.
    """
    time, height, width = (
        a // b for a, b in zip(_checked(grid_thw, vision.spatial_merge_size), _unit(vision), strict=True)
    )
    tokens = np.arange(time * height * width, dtype=np.int64).reshape(time, height, width)
    side = vision.window_size // (vision.spatial_merge_size * vision.patch_size) or max(height, width)
    windows = [
        tokens[frame, top : top + side, left : left + side].reshape(-1)
        for frame in range(time)
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]
    return np.concatenate(windows), _cumulative(np.array([len(w) for w in windows]) * vision.spatial_merge_size**2)


def frame_seqlens(grid_thw: Grid) -> Int32:
    """Return cu_seqlens [t + 1] int32 of full attention: cumulative patches, one stretch per temporal patch.

    Raises:
        ConfigError: an axis of the grid is not a positive whole number.
    """
    time, height, width = _checked(grid_thw, 1)
    return _cumulative(np.full(time, height * width))


def _span_positions(span: SpanLike, tokens_per_second: float | None, merge: int) -> Int64:
    """Return the positions [3, tokens] of one image or video, counted from its own start."""
    time, height, width = span.grid_thw[0], span.grid_thw[1] // merge, span.grid_thw[2] // merge
    times = np.arange(time, dtype=np.int64)
    if span.is_image:
        times *= 0
    elif tokens_per_second is not None:
        seconds = span.seconds_per_temporal_patch
        if not 0 <= seconds * tokens_per_second * time < 2**31:
            raise ConfigError(
                f"a video of {time} temporal patches has {seconds} seconds per temporal patch; accepted: 0 or more, "
                f"and fewer than 2**31 positions at {tokens_per_second} per second"
            )
        scaled = times.astype(np.float32) * np.float32(seconds) * np.float32(tokens_per_second)
        times = np.floor(scaled).astype(np.int64)
    grid = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return np.stack(grid).reshape(3, -1)


def _fill_text(positions: Int64, start: int) -> int:
    """Write consecutive positions from `start`, the same on all axes; return the one after them."""
    positions[:] = np.arange(start, start + positions.shape[1])
    return start + int(positions.shape[1])


def _num_tokens(grid_thw: Grid, merge: int) -> int:
    time, height, width = _checked(grid_thw, merge)
    return time * (height // merge) * (width // merge)


def _checked(grid_thw: Grid, merge: int) -> Grid:
    time, height, width = (int(axis) for axis in grid_thw)
    if min(time, height, width) < 1 or height % merge or width % merge:
        raise ConfigError(
            f"grid_thw is {list(grid_thw)} patches; accepted: 1 or more per axis, height and width multiples of "
            f"spatial_merge_size = {merge}"
        )
    return time, height, width


def _unit(vision: Vision) -> Grid:
    return 1, vision.spatial_merge_size, vision.spatial_merge_size


def _inverse_frequencies(dim: int, theta: float) -> Float32:
    """Return theta ** (-2j / dim), j < dim / 2, each step rounded to float32 as in the models' own code."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers = np.power(np.float64(theta), exponents.astype(np.float64)).astype(np.float32)
    return np.float32(1) / powers


def _cos_sin(angles: Float32) -> tuple[Float32, Float32]:
    wide = np.ascontiguousarray(angles).astype(np.float64)
    return np.cos(wide).astype(np.float32), np.sin(wide).astype(np.float32)


def _cumulative(lengths: npt.NDArray[Any]) -> Int32:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
