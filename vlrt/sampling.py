"""Which frames of a video are taken, and at what size: the rules of qwen-vl-utils 0.0.14 as pure functions.

Knows counts, rates and sizes. Knows no file, no pixel and no model beyond `Vision`'s patch sizes.
"""

import math

import numpy as np
from numpy.typing import NDArray

from vlrt.config import Video, Vision
from vlrt.errors import VideoError

FRAME_FACTOR = 2  # a video is sampled at a multiple of this many frames
MAX_ASPECT_RATIO = 200
MAX_TOKENS_PER_FRAME = 768  # merged patches; caps the pixels of one frame whatever `video.max_pixels` allows


def num_samples(
    total_frames: int, source_fps: float, video: Video, *, num_frames: int | None = None, fps: float | None = None
) -> int:
    """Return how many of `total_frames` frames are sampled: an even number from 2 to `total_frames`.

    `num_frames` is rounded to the nearest even number (a tie goes to the multiple of 4). `fps` (frames per second) is
    clamped to `video.min_frames` and `video.max_frames` and rounded down to an even number. At most one of them is
    given; `video.num_frames`, then `video.fps`, stand in. Source: qwen-vl-utils, `smart_nframes`.

    Raises:
        VideoError: both are given, one is out of range, the video has fewer than 2 frames or fewer than `num_frames`.
    """
    if num_frames is not None and fps is not None:
        raise VideoError(f"num_frames = {num_frames} and fps = {fps:g} were both given; pass only one of them")
    if total_frames < FRAME_FACTOR:
        raise VideoError(
            f"the video has {total_frames} frame(s); accepted: {FRAME_FACTOR} or more. Pass a single frame as an image"
        )
    if num_frames is None and fps is None:
        num_frames = video.num_frames
    if num_frames is not None:
        return _uniform(num_frames, total_frames)
    fps = video.fps if fps is None else fps
    if isinstance(fps, bool) or not isinstance(fps, int | float | np.number) or not 0 < fps < math.inf:
        raise VideoError(f"fps is {fps!r}; accepted: a number above 0")
    low = math.ceil(video.min_frames / FRAME_FACTOR) * FRAME_FACTOR
    high = math.floor(video.max_frames / FRAME_FACTOR) * FRAME_FACTOR
    count = min(min(max(total_frames / source_fps * fps, low), high), total_frames)
    even = math.floor(count / FRAME_FACTOR) * FRAME_FACTOR
    if even < FRAME_FACTOR:
        raise VideoError(f"video.max_frames is {video.max_frames}; accepted: {FRAME_FACTOR} or more")
    return even


def frame_indices(total_frames: int, count: int) -> NDArray[np.int64]:
    """Return the indices [count] of the sampled frames: evenly spaced from the first to the last, ascending.

    Equal to `torch.linspace(0, total_frames - 1, count).round()`, which counts in float32 from both ends and fuses
    multiply and add, here in float64: the products of two float32 are exact in it. Source: qwen-vl-utils, torch.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    end = np.float32(total_frames - 1)
    step = np.float64(end / np.float32(count - 1))
    position = np.arange(count)
    values = np.where(position < count // 2, step * position, np.float64(end) - step * (count - 1 - position))
    nearest = np.rint(values.astype(np.float32)).astype(np.int64)
    return np.minimum(nearest, total_frames - 1)  # float32 cannot hold every count above 2**24


def smart_resize(height: int, width: int, factor: int, min_pixels: float, max_pixels: float) -> tuple[int, int]:
    """Return (height, width) as multiples of `factor` with about the same aspect ratio, from min to max pixels.

    Rounding comes first and only a size out of bounds is scaled, so that a size scaled up may end above `max_pixels`
    and one scaled down below `min_pixels` where the two lie close together, and no side is ever below `factor`.
    Source: qwen-vl-utils, `smart_resize`.

    Raises:
        VideoError: a side is 0, or one side is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise VideoError(f"the picture is {height} x {width} pixels; accepted: sides of 1 or more")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise VideoError(
            f"the picture is {height} x {width} pixels; accepted: sides that differ by a factor of at most "
            f"{MAX_ASPECT_RATIO}. Crop or pad it"
        )
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns


def size_factor(vision: Vision) -> int:
    """Return the number of pixels that both sides of a frame are multiples of: one merged patch."""
    return vision.patch_size * vision.spatial_merge_size


def image_size(height: int, width: int, video: Video, vision: Vision, *, merged: int = 1) -> tuple[int, int]:
    """Return the (height, width) in pixels at which an image is shown to the model.

    `merged` = `vision.spatial_merge_size` gives the size at which qwen-vl-utils reads each image of a list that makes
    up a video: a multiple of two merged patches, with bounds to match, before the frames are resized as a video.
    """
    factor = size_factor(vision) * merged
    return smart_resize(height, width, factor, video.image_min_pixels * merged**2, video.image_max_pixels * merged**2)


def frame_size(height: int, width: int, num_frames: int, video: Video, vision: Vision) -> tuple[int, int]:
    """Return the (height, width) in pixels at which each of `num_frames` frames of a video is shown to the model.

    A frame has at most 768 merged patches, and at most its share of `video.total_pixels` (each temporal patch is two
    frames), but is never squeezed below 1.05 times `video.min_pixels`. Source: qwen-vl-utils, `fetch_video`.
    """
    factor = size_factor(vision)
    padded = math.ceil(num_frames / FRAME_FACTOR) * FRAME_FACTOR
    share = min(MAX_TOKENS_PER_FRAME * factor**2, video.total_pixels / padded * FRAME_FACTOR)
    cap = max(share, int(video.min_pixels * 1.05))
    return smart_resize(height, width, factor, video.min_pixels, min(cap, video.max_pixels))


def _uniform(num_frames: int, total_frames: int) -> int:
    if isinstance(num_frames, bool) or not isinstance(num_frames, int | np.integer):
        raise VideoError(f"num_frames is {num_frames!r}; accepted: a whole number of {FRAME_FACTOR} or more")
    count = round(int(num_frames) / FRAME_FACTOR) * FRAME_FACTOR
    if count < FRAME_FACTOR:
        raise VideoError(
            f"num_frames is {num_frames}; accepted: {FRAME_FACTOR} or more. Pass a single frame as an image"
        )
    if count > total_frames:
        rounded = "" if count == num_frames else f" (rounded to {count}, an even number)"
        raise VideoError(
            f"{num_frames} frames were asked for{rounded} and the video has {total_frames}; "
            f"accepted: 2 to {total_frames // FRAME_FACTOR * FRAME_FACTOR}"
        )
    return count
