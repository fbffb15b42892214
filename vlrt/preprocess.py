"""`Frames` to `Patches`: sizes, padding, normalisation, and the order in which Qwen's vision towers read patches.

Knows `Vision`'s patch sizes and `Video`'s mean and std. Knows no file, no prompt and no tower.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vlrt.config import Video, Vision
from vlrt.errors import VideoError
from vlrt.resampling import resize
from vlrt.sampling import frame_size, image_size, size_factor
from vlrt.video import Frames


@dataclass(frozen=True)
class Patches:
    """What a vision tower reads, of all temporal patches or of a chunk of them.

    Attributes:
        pixels: [n, patch_dim] float32, normalised; n = t * h * w, in merge-window order; patch_dim runs over channel,
            frame of the temporal patch, row, column.
        grid_thw: patches (time, height, width) of these pixels.
        seconds_per_temporal_patch: temporal_patch_size / sample_fps, fractional.
        is_image: one still picture, without time.
    """

    pixels: NDArray[np.float32]
    grid_thw: tuple[int, int, int]
    seconds_per_temporal_patch: float
    is_image: bool


def resized(frames: Frames, video: Video, vision: Vision) -> Frames:
    """Return frames at a size that the tower takes, T padded to a multiple of `temporal_patch_size`.

    Frames that `load` resized already (their size is not the source's) stay; arrays are resized by the rules of
    `sampling.frame_size` or `sampling.image_size`. Padding repeats the last frame and its time.

    Raises:
        VideoError: one side is more than 200 times the other.
    """
    data, times = frames.data, frames.pts_seconds
    count = len(data)
    data = at_size(data, target_size(frames, video, vision))
    missing = -count % vision.temporal_patch_size
    if missing:
        data = np.concatenate([data, np.repeat(data[-1:], missing, axis=0)])
        times = np.concatenate([times, np.repeat(times[-1:], missing)])
    return replace(frames, data=data, pts_seconds=times)


def target_size(frames: Frames, video: Video, vision: Vision) -> tuple[int, int]:
    """Return the (height, width) in pixels that `resized` gives frames.

    Raises:
        VideoError: one side is more than 200 times the other.
    """
    count, height, width, _ = frames.data.shape
    factor = size_factor(vision)
    untouched = (height, width) == (frames.source_height, frames.source_width)
    if not untouched and height % factor == width % factor == 0:
        return height, width
    if frames.is_image:
        return image_size(height, width, video, vision)
    return frame_size(height, width, count, video, vision)


def at_size(data: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return frames [T, H, W, 3] resized to (height, width); the same array where they have it already."""
    if data.shape[1:3] == size:
        return data
    sized = np.empty((len(data), *size, 3), np.uint8)
    for i, picture in enumerate(data):
        sized[i] = resize(picture, size)
    return sized


def grid_of(frames: Frames, vision: Vision) -> tuple[int, int, int]:
    """Return the patches (time, height, width) of frames that went through `resized`.

    Raises:
        VideoError: they did not.
    """
    return grid_of_shape(frames.data.shape, vision)


def grid_of_shape(shape: tuple[int, ...], vision: Vision) -> tuple[int, int, int]:
    """Return what `grid_of` does, of frames [T, H, W, 3] of which only the shape is known yet."""
    count, height, width, _ = shape
    factor = size_factor(vision)
    if count % vision.temporal_patch_size or height % factor or width % factor:
        raise VideoError(
            f"the frames are {list(shape)}; accepted: T a multiple of {vision.temporal_patch_size}, "
            f"H and W multiples of {factor}. Pass them through vlrt.preprocess.resized"
        )
    return count // vision.temporal_patch_size, height // vision.patch_size, width // vision.patch_size


def take(frames: Frames, vision: Vision, wanted: NDArray[np.bool_]) -> Frames:
    """Return the frames of some temporal patches.

    Args:
        frames: as `resized` returns them.
        vision: patch sizes.
        wanted: [T], by temporal patch.
    """
    if wanted.all():
        return frames
    each = np.repeat(wanted, vision.temporal_patch_size)
    return replace(frames, data=frames.data[each], pts_seconds=frames.pts_seconds[each])


def seconds_per_temporal_patch(frames: Frames, vision: Vision) -> float:
    """Return how many seconds of the video one temporal patch of its sampled frames covers, fractional."""
    return vision.temporal_patch_size / frames.sample_fps


def patchify(frames: Frames, video: Video, vision: Vision, start: int = 0, stop: int | None = None) -> Patches:
    """Return the normalised patches of temporal patches `start` to `stop` (exclusive; None: the last).

    float32 pixels take 4 times the frames' memory: asked for in chunks, they exist for one chunk at a time.
    Source: transformers, `Qwen2VLImageProcessor`: (value / 255 - mean) / std.

    Args:
        frames: as `resized` returns them.
        video: mean and std per channel.
        vision: patch sizes.
        start: first temporal patch.
        stop: the one after the last temporal patch.

    Raises:
        VideoError: the frames did not go through `resized`, or the range is empty or beyond them.
    """
    total, rows, columns = grid_of(frames, vision)
    stop = total if stop is None else stop
    pixels = cut(frames.data, video, vision, start, stop)
    seconds = seconds_per_temporal_patch(frames, vision)
    return Patches(pixels, (stop - start, rows, columns), seconds, frames.is_image)


def cut(data: NDArray[np.uint8], video: Video, vision: Vision, start: int, stop: int) -> NDArray[np.float32]:
    """Return the pixels [n, patch_dim] of `Patches`: see `patchify`. Of `data` only these frames are looked at."""
    total, rows, columns = grid_of_shape(data.shape, vision)
    if not 0 <= start < stop <= total:
        raise VideoError(f"temporal patches {start} to {stop} were asked for; accepted: a range within 0 to {total}")
    steps, size, merge = vision.temporal_patch_size, vision.patch_size, vision.spatial_merge_size
    count = stop - start
    blocks = data[start * steps : stop * steps].reshape(
        count, steps, rows // merge, merge, size, columns // merge, merge, size, 3
    )
    # (time, window row, window column, row, column in the window, channel, frame, row, column in the patch)
    ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(count * rows * columns, 3, steps * size * size)
    pixels = ordered.astype(np.float32)
    pixels *= np.float32(1 / 255)  # in place: three passes over what the caches hold take less than one look-up each
    pixels -= np.array(video.mean, np.float32)[:, None]
    pixels /= np.array(video.std, np.float32)[:, None]
    return pixels.reshape(len(pixels), vision.patch_dim)
