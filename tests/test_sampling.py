"""The sampling and size rules against qwen-vl-utils itself, over many inputs, and their own promises."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.qwen_reference import vision_process
from tests.videos import VISION
from vlrt.config import Video
from vlrt.errors import VideoError
from vlrt.sampling import frame_indices, frame_size, image_size, num_samples, smart_resize

sides = st.integers(1, 9000)
many = settings(max_examples=300, deadline=None)


@many
@given(st.integers(2, 20_000_000), st.integers(2, 800))
def test_indices_are_those_of_torch(total: int, count: int) -> None:
    # Would catch rounding in float64 or half up: single frames off by one against training.
    count = min(count, total)
    expected = torch.linspace(0, total - 1, count).round().long().clamp(max=total - 1)
    np.testing.assert_array_equal(frame_indices(total, count), expected.numpy())


@many
@given(st.integers(2, 100_000), st.integers(2, 800))
def test_indices_ascend_from_first_to_last(total: int, count: int) -> None:
    # Would catch an index past the end, or frames out of order, which decoding cannot deliver.
    indices = frame_indices(total, min(count, total))
    assert indices[0] == 0
    assert indices[-1] == total - 1
    assert (np.diff(indices) > 0).all()


def test_one_index_is_the_first_frame() -> None:
    # Would catch a division by count - 1 for lists of a single image.
    assert frame_indices(5, 1).tolist() == [0]


@many
@given(
    st.integers(2, 1_000_000),
    st.one_of(st.sampled_from([24000 / 1001, 25.0, 30000 / 1001, 30.0, 60.0]), st.floats(0.1, 240)),
    st.one_of(st.sampled_from([1.0, 2.0, 4.0]), st.floats(0.01, 100)),
    st.integers(1, 12),
    st.integers(2, 800),
)
def test_fps_counts_are_those_of_the_reference(total: int, rate: float, fps: float, low: int, high: int) -> None:
    # Would catch a clamp in another order, or rounding to the nearest even number in place of down.
    assume(low <= high)
    element = {"fps": fps, "min_frames": low, "max_frames": high}
    expected = vision_process().smart_nframes(element, total_frames=total, video_fps=rate)
    assert num_samples(total, rate, Video(min_frames=low, max_frames=high), fps=fps) == expected


@many
@given(st.integers(2, 5000), st.integers(1, 800))
def test_uniform_counts_are_those_of_the_reference(total: int, asked: int) -> None:
    # Would catch odd counts kept, cut down or rounded half up; and asking for too many answered with fewer.
    try:
        expected = vision_process().smart_nframes({"nframes": asked}, total_frames=total, video_fps=30.0)
    except ValueError:
        with pytest.raises(VideoError, match=str(asked)):
            num_samples(total, 30.0, Video(), num_frames=asked)
    else:
        assert num_samples(total, 30.0, Video(), num_frames=asked) == expected


def test_settings_stand_in_for_arguments() -> None:
    # Would catch an argument that loses against the setting.
    uniform = Video(num_frames=8)
    assert num_samples(300, 30.0, uniform) == 8
    assert num_samples(300, 30.0, uniform, num_frames=16) == 16
    assert num_samples(300, 30.0, uniform, fps=1.0) == 10
    assert num_samples(300, 30.0, Video()) == 20


@many
@given(sides, sides, st.sampled_from([8, 14, 28, 32, 56]), st.integers(1, 2_000_000), st.floats(1, 50))
def test_smart_resize_is_that_of_the_reference(h: int, w: int, factor: int, low: int, ratio: float) -> None:
    # Would catch any other order of rounding and scaling.
    assume(max(h, w) <= 200 * min(h, w))
    high = low * ratio
    expected = vision_process().smart_resize(h, w, factor, low, high)
    assume(min(expected) > 0)  # where the reference loses a side altogether, ours keeps one factor
    assert smart_resize(h, w, factor, low, high) == expected


@many
@given(sides, sides, st.integers(4, 768), st.integers(4, 50))
def test_smart_resize_keeps_its_promises(height: int, width: int, tokens: int, ratio: int) -> None:
    # Would catch sizes that the tower cannot cut into patches, budgets overrun, and pictures out of shape.
    assume(max(height, width) <= 200 * min(height, width))
    factor, low, high = 28, tokens * 784, tokens * 784 * ratio
    rows, columns = smart_resize(height, width, factor, low, high)
    assert rows % factor == columns % factor == 0
    assert min(rows, columns) >= factor
    assert low <= rows * columns or min(rows, columns) == factor or rows * columns > high * 0.5
    assert rows * columns <= high or min(rows, columns) == factor
    # One common scale puts both sides within one factor of their ideals: the bound on the aspect ratio's error.
    lowest = max((rows - factor) / height, (columns - factor) / width)
    highest = min((rows + factor) / height, (columns + factor) / width)
    assert lowest <= highest


def test_a_side_is_never_lost() -> None:
    # The reference answers 0 rows here, which no tower takes.
    assert smart_resize(10, 2000, 28, 1, 56 * 56) == (28, 784)


def test_wild_shapes_are_refused() -> None:
    # Would catch slivers that blow one side up to thousands of pixels.
    with pytest.raises(VideoError, match="10 x 2001"):
        smart_resize(10, 2001, 28, 784, 7840)
    with pytest.raises(VideoError, match="0 x 5"):
        smart_resize(0, 5, 28, 784, 7840)


@pytest.mark.parametrize("num_frames", [1, 2, 63, 64, 300, 768])
@pytest.mark.parametrize("shape", [(1080, 1920), (123, 777), (2160, 3840), (64, 64)])
def test_frames_are_capped_by_pixels_and_by_their_share(num_frames: int, shape: tuple[int, int]) -> None:
    # Would catch the missing per-frame cap of transformers 5.x: a long 4K video of millions of tokens.
    rows, columns = frame_size(*shape, num_frames, Video(max_pixels=10**9), VISION)
    assert rows * columns <= 768 * 28 * 28
    assert rows * columns * num_frames <= Video().total_pixels * 2 or rows * columns <= 1.05 * Video().min_pixels


def test_an_image_keeps_its_size_within_its_bounds() -> None:
    # Would catch images squeezed under a video frame's budget.
    assert image_size(1080, 1920, Video(), VISION) == (1092, 1932)
    assert image_size(1080, 1920, Video(), VISION, merged=2) == (1064, 1904)
