"""Video files, images and arrays to `Frames`: the sampled pictures of a video and their times.

Knows sources, caps and the family's sampling rules (sampling.py). Knows no patches, no prompt and no model beyond
`Vision`'s patch sizes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlrt.config import Video, Vision
from vlrt.container import Container
from vlrt.decoding import decode_frames
from vlrt.errors import VideoError
from vlrt.images import is_image, read_image
from vlrt.resampling import resize
from vlrt.sampling import frame_indices, frame_size, image_size, num_samples
from vlrt.timeline import list_frames

if TYPE_CHECKING:  # importing av takes a while, and arrays do without it
    from av.video.frame import VideoFrame

Path: TypeAlias = str | os.PathLike[str]
Admit: TypeAlias = Callable[[int, int, int], None]
Check: TypeAlias = Callable[[], None]


@dataclass(frozen=True)
class Frames:
    """The sampled frames of a video, or one image.

    Attributes:
        data: [T, H, W, 3] uint8, RGB, upright; from files already at the model's size, from arrays as given.
        pts_seconds: [T] float64, presentation times from the first frame of the stream on.
        source_fps: frames per second of the source: nominal, or the mean where the rate varies; None for an image.
        duration_seconds: of the source, the time that its last frame is shown included; 0 for an image.
        sample_fps: frames per second of the sampled sequence: T / frames of the source * source_fps.
        source_height: pixels, as displayed (after rotation), before resizing.
        source_width: pixels, likewise.
        is_image: one still picture, without time.
        warnings: what a user should know, e.g. that the file is truncated.
    """

    data: NDArray[np.uint8]
    pts_seconds: NDArray[np.float64]
    source_fps: float | None
    duration_seconds: float
    sample_fps: float
    source_height: int
    source_width: int
    is_image: bool = False
    warnings: tuple[str, ...] = ()

    @classmethod
    def from_array(cls, array: ArrayLike, *, fps: float) -> Frames:
        """Take frames as they are: none is left out, whatever the sampling settings say.

        Args:
            array: [T, H, W, 3] uint8, RGB, T at least 1; not copied where it is a contiguous NumPy array.
            fps: frames per second of the array.

        Raises:
            VideoError: another shape or dtype, no frame, or an `fps` that is not a number above 0.
        """
        data = np.asarray(array)
        if data.ndim != 4 or data.shape[-1] != 3 or data.dtype != np.uint8:
            raise VideoError(f"the array is {list(data.shape)} {data.dtype}; accepted: [T, H, W, 3] uint8, RGB")
        if 0 in data.shape:
            raise VideoError(f"the array is {list(data.shape)}; accepted: at least 1 frame of at least 1 x 1 pixels")
        fps = _checked_fps(fps)
        count, height, width, _ = data.shape
        times = np.arange(count) / fps
        return cls(np.ascontiguousarray(data), times, fps, count / fps, fps, height, width)


class Target(Protocol):
    """Where the frames of a video go as they are decoded."""

    def begin(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """Return memory for all frames [T, H, W, 3]."""

    def written(self, count: int) -> None:
        """Learn that the first `count` frames are there."""


class Memory:
    """A `Target` that has memory, and no use for what is not yet whole."""

    def begin(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """See `Target`."""
        return np.empty(shape, np.uint8)

    def written(self, count: int) -> None:
        """See `Target`."""


@dataclass(frozen=True)
class _Wanted:
    """What `load` was asked for, and whom it tells: see there."""

    video: Video
    vision: Vision
    num_frames: int | None
    fps: float | None
    target: Target
    admit: Admit
    check: Check


def load(
    source: Path | bytes | Sequence[Path] | Frames,
    video: Video,
    vision: Vision,
    *,
    num_frames: int | None = None,
    fps: float | None = None,
    target: Target | None = None,
    admit: Admit = lambda *_: None,
    check: Check = lambda: None,
) -> Frames:
    """Read a video or an image and return its frames, sampled and resized by the rules of qwen-vl-utils.

    Frames are picked by index, evenly from the first to the last frame that the file really has, and carry their own
    times, so that variable frame rates are told truly. Memory: the sampled frames at the model's size, and what the
    decoder holds.

    A truncated file, or one whose header promises more frames than there are, is sampled over the frames that are
    there, with a warning in `Frames.warnings`. An MP4 that lost its index (written last) cannot be opened. A frame
    that does not decode is an error rather than silently replaced by its neighbour; one that decodes from damaged data
    comes with a warning. Rotation and mirroring that the file asks for are applied; non-square pixels are not
    stretched (as in qwen-vl-utils).

    Args:
        source: the path or the bytes of a video, GIF or image (by content, not by name); a list of image files, which
            are the frames of a video (all taken unless `num_frames` is given, at `fps` or `video.fps`; a first resize
            to multiples of two merged patches as in qwen-vl-utils); or `Frames`, returned as they are.
        video: sampling, sizes and caps.
        vision: patch sizes.
        num_frames: uniform sampling of so many frames, in place of the setting; rounded to an even number. An image
            has one frame whatever it says.
        fps: sampling at so many frames per second, in place of the setting.
        target: gives the memory for a video's frames, and learns of each; None: NumPy does. Images need none.
        admit: told the number of frames, their height and width in pixels at the model's size, as soon as these are
            known: when the first frame is decoded, before there is memory for the others. What it raises is passed on.
        check: called all along, before each packet and each image of a list. What it raises is passed on.

    Raises:
        VideoError: no file, no video stream, damaged where frames are wanted, fewer frames than asked for (or than
            2), beyond a cap on bytes, pixels or frames, or both `num_frames` and `fps`.
    """
    if num_frames is not None and fps is not None:
        raise VideoError(f"num_frames = {num_frames} and fps = {fps} were both given; pass only one of them")
    if isinstance(source, Frames):
        return source
    wanted = _Wanted(video, vision, num_frames, fps, target or Memory(), admit, check)
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray | memoryview):
        return _load_list(source, wanted)
    content, name = _checked_source(source, video)
    if is_image(content, name):

        def size_of(height: int, width: int) -> tuple[int, int]:
            size = image_size(height, width, video, vision)
            admit(1, *size)
            return size

        data, height, width = read_image(content, name, video, size_of)
        return Frames(data[None], np.zeros(1), None, 0.0, video.fps, height, width, is_image=True)
    return _load_video(content, name, wanted)


def _load_video(source: str | bytes, name: str, wanted: _Wanted) -> Frames:
    from av.video.reformatter import VideoReformatter

    video = wanted.video
    with Container(source, name, video, wanted.check) as container:
        times = list_frames(container)
        total = len(times.keys)
        try:
            count = num_samples(total, times.fps, video, num_frames=wanted.num_frames, fps=wanted.fps)
        except VideoError as error:
            raise VideoError(f"{name}: {error}") from None
        indices = frame_indices(total, count)
        data = np.empty((0, 0, 0, 3), np.uint8)
        height = width = 0
        matrix = None
        to_rgb = VideoReformatter()  # one for all frames: making swscale's tables takes longer than using them
        for i, frame in enumerate(decode_frames(container, times, indices.tolist())):
            matrix = _display_matrix(frame) if i == 0 else matrix
            picture = _upright(to_rgb.reformat(frame, format="rgb24"), matrix)
            if i == 0:
                height, width = picture.shape[:2]
                size = frame_size(height, width, count, video, wanted.vision)
                wanted.admit(count, *size)
                data = wanted.target.begin((count, *size, 3))
            elif picture.shape[:2] != (height, width):
                container.warn(f"{name} changes its size at {times.seconds[indices[i]]:.2f} s; frames were made equal")
            data[i] = resize(picture, (data.shape[1], data.shape[2]))
            wanted.target.written(i + 1)
        sample_fps = count / total * times.fps
        seconds = times.seconds[indices]
        warnings = tuple(container.warnings)
    return Frames(data, seconds, times.fps, times.duration_seconds, sample_fps, height, width, warnings=warnings)


def _load_list(sources: Sequence[Path], wanted: _Wanted) -> Frames:
    """Read image files as the frames of a video: each at its own size, then all at one size."""
    video, vision = wanted.video, wanted.vision
    if not sources:
        raise VideoError("the list of image files is empty; pass at least one")
    if len(sources) > video.max_source_frames:
        raise VideoError(f"{len(sources)} image files; accepted: at most video.max_source_frames")
    rate, count = _checked_fps(video.fps if wanted.fps is None else wanted.fps), len(sources)
    if wanted.num_frames is not None:
        count = num_samples(count, rate, video, num_frames=wanted.num_frames)
    indices = frame_indices(len(sources), count)
    merge = vision.spatial_merge_size
    data = np.empty((0, 0, 0, 3), np.uint8)
    first, height, width = (0, 0), 0, 0
    for i, index in enumerate(indices):
        wanted.check()
        content, name = _checked_source(sources[index], video)
        picture, rows, columns = read_image(
            content, name, video, lambda h, w: image_size(h, w, video, vision, merged=merge)
        )
        if i == 0:
            first, height, width = picture.shape[:2], rows, columns
            size = frame_size(*first, count, video, vision)
            wanted.admit(count, *size)
            data = wanted.target.begin((count, *size, 3))
        elif picture.shape[:2] != first:
            raise VideoError(
                f"{name} is {rows} x {columns} pixels, the list's first image {height} x {width}; "
                "accepted: images of one size. Resize them, or pass them one by one"
            )
        data[i] = resize(picture, (data.shape[1], data.shape[2]))
        wanted.target.written(i + 1)
    sample_fps = count / len(sources) * rate
    return Frames(data, indices / rate, rate, len(sources) / rate, sample_fps, height, width)


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int] | None:
    """Return (a, b, c, d), by which a pixel is shown at x' = a x + c y and y' = b x + d y, y down; None: as stored.

    Asked of one frame per video: PyAV keeps each frame whose side data were looked at until the garbage collector runs.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = np.frombuffer(memoryview(matrix), np.int32, count=5).tolist()  # type: ignore[arg-type]  # a buffer
    return a, b, c, d


def _upright(frame: VideoFrame, matrix: tuple[int, int, int, int] | None) -> NDArray[np.uint8]:
    """Return an RGB frame as [H, W, 3] uint8, turned by quarters and mirrored as the display matrix says."""
    picture: NDArray[np.uint8] = frame.to_ndarray()  # type: ignore[assignment]  # rgb24 is uint8
    if matrix is None:
        return picture
    a, b, c, d = matrix
    if abs(b) > abs(a):
        picture, flip_rows, flip_columns = picture.swapaxes(0, 1), b < 0, c < 0
    else:
        flip_rows, flip_columns = d < 0, a < 0
    return np.ascontiguousarray(picture[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])


def _checked_source(source: Any, video: Video) -> tuple[str | bytes, str]:
    """Return a source as a path or bytes, with the name that messages give it, within the cap on bytes."""
    if isinstance(source, bytes | bytearray | memoryview):
        content: str | bytes = bytes(source)
        name, size = f"the video in memory ({len(content)} bytes)", len(content)
    elif isinstance(source, str | os.PathLike):
        content = name = os.fsdecode(source)
        if not os.path.isfile(content):
            kind = "is no regular file" if os.path.exists(content) else "does not exist"
            raise VideoError(f"{name} {kind}; pass a video or image file, or a list of image files")
        size = os.path.getsize(content)
    else:
        raise VideoError(
            f"the source is a {type(source).__name__}; accepted: a path, bytes, a list of image paths, or Frames "
            "(arrays: vlrt.Frames.from_array(array, fps=...))"
        )
    if not size:
        raise VideoError(f"{name} is empty; fetch it again")
    if size > video.max_file_bytes:
        raise VideoError(
            f"{name} has {size} bytes; accepted: at most {video.max_file_bytes}. Cut it, or raise video.max_file_bytes"
        )
    return content, name


def _checked_fps(fps: float) -> float:
    if isinstance(fps, bool) or not isinstance(fps, int | float | np.number) or not 0 < fps < math.inf:
        raise VideoError(f"fps is {fps!r}; accepted: a number above 0")
    return float(fps)
