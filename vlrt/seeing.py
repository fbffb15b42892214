"""A video from its file to its tokens, in one pass: the vision tower reads frames while later ones are decoded.

A thread decodes and resizes into memory that holds all frames; the caller cuts patches of those that are there, and
runs the tower over as many at a time as it would of a whole video. Temporal patches never look at one another there, so
that the tokens are the same to the bit. Knows the order of this work; no container, no engine from within, no question.
"""

import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from vlrt import config, content, preprocess, prompt, reduction, video
from vlrt.answer import Clock
from vlrt.backends.base import Array, Backend
from vlrt.content import Source
from vlrt.encoding import encode, encode_kept, num_passes
from vlrt.errors import Stopped
from vlrt.generate import pool
from vlrt.memory import Shown
from vlrt.reduction import NONE, Reduction
from vlrt.video import Admit, Frames, Target

# Passes of the tower from which on it does not wait for the last frame. On two cores decoder and tower take from each
# other: up to 8 passes that cost about what it saved, docs/log.md has the times.
LEAST_PASSES = 16

Fits = Callable[[Shown], object]


@dataclass(frozen=True)
class View:
    """A video, and what of it is looked at: see `Runtime.ask`."""

    video: Source
    num_frames: int | None = None
    fps: float | None = None
    reduce: Reduction = NONE

    def name(self) -> Hashable | None:
        """Return a name that equal views of equal contents have; None: the video cannot be read."""
        found = content.content_key(self.video, self.num_frames, self.fps)
        return None if found is None else (found, self.reduce)


@dataclass(frozen=True)
class Seen:
    """What `memory.Memory` is made of.

    Attributes:
        shown: what was encoded.
        tokens: [N, C], of the vision tower, those that are kept.
        pooled: [T_v, C], all of them pooled over space.
    """

    shown: Shown
    tokens: Array
    pooled: Array


def see(backend: Backend, model: config.Model, view: View, clock: Clock, admit: Admit, fits: Fits) -> Seen:
    """Decode and encode a video.

    Args:
        backend: has the tower.
        model: its config.
        view: what is looked at.
        clock: counts. Of stages that run side by side, it counts what the caller waits for: they add up to the time
            that went by.
        admit: see `video.load`; called before anything is encoded, in whatever thread.
        fits: told what is shown, before that is encoded, where this depends on all frames; what it raises is passed on.

    Raises:
        VideoError: the video cannot be used.
        Stopped: the clock says so.
    """
    upload = backend.frame_upload()
    target = upload or video.Memory()
    if isinstance(view.video, Frames) or view.reduce.unchanged is not None:
        with clock("decode"):
            frames = _load(view, model, target, admit, clock.check)
    else:
        with _Decoding(target, model.vision.temporal_patch_size, clock) as decoding:
            decoding.start(lambda: _load(view, model, decoding, admit, decoding.check))
            with clock("decode"):
                data = decoding.begun()
                if data is not None and num_passes(backend, model, data.shape) < LEAST_PASSES:
                    decoding.wait(len(data))
            tokens = None if data is None else encode(backend, model, data, clock, upload, decoding.wait)
            with clock("decode"):
                frames = decoding.whole()
        if data is not None:
            shown = _shown(frames, preprocess.grid_of_shape(data.shape, model.vision), model)
            return Seen(shown, tokens, pool(tokens, shown.media.grid_thw[0]))
    with clock("preprocess"):
        resized = preprocess.resized(frames, model.video, model.vision)
        kept = None
        if view.reduce.unchanged is not None:
            kept = reduction.changed(resized, model.vision, view.reduce.unchanged).reshape(-1)
        shown = _shown(frames, preprocess.grid_of(resized, model.vision), model, kept)
    if kept is not None:
        fits(shown)
    return Seen(shown, *encode_kept(backend, model, resized, kept, clock, upload))


class _Decoding:
    """Frames on their way from a thread that decodes them; a `video.Target`, and a context manager.

    Whoever leaves it, for whatever reason, has the thread end with the packet it is at, and waits for that. Frames that
    fill the last temporal patch are added behind a video's last one, as `preprocess.resized` adds them.

    Args:
        target: gives the memory.
        steps: frames of a temporal patch.
        clock: tells whether to go on.
    """

    def __init__(self, target: Target, steps: int, clock: Clock) -> None:
        self._target, self._steps, self._clock = target, steps, clock
        self._thread: threading.Thread | None = None
        self._news = threading.Condition()
        self._data: NDArray[np.uint8] | None = None  # [T, H, W, 3], padded
        self._num_frames = self._num_ready = 0
        self._ended = self._left = False
        self._frames: Future[Frames] = Future()

    def __enter__(self) -> "_Decoding":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._thread is not None:
            self._thread.join()
        del self._data, self._frames  # an error refers to the calls that it came through, and so to this

    def start(self, load: Callable[[], Frames]) -> None:
        """Have a thread decode into this."""

        def run() -> None:
            try:
                self._frames.set_result(load())
            except BaseException as error:  # whoever waits raises it
                self._frames.set_exception(error)
            finally:
                with self._news:
                    self._ended = True
                    self._news.notify_all()

        thread = threading.Thread(target=run, name="vlrt-decode", daemon=True)  # one at exit keeps nobody waiting
        thread.start()
        self._thread = thread

    def check(self) -> None:
        """Return where frames are still wanted.

        Raises:
            Stopped: they are not.
        """
        if self._left:
            raise Stopped("nobody waits for these frames any more")
        self._clock.check()

    def begin(self, shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
        """See `video.Target`."""
        self._num_frames = shape[0]
        padded = -(-shape[0] // self._steps) * self._steps
        data = self._target.begin((padded, *shape[1:]))
        with self._news:
            self._data = data
            self._news.notify_all()
        return data[: shape[0]]

    def written(self, count: int) -> None:
        """See `video.Target`."""
        self.check()
        assert self._data is not None, "frames are written to what `begin` returned"
        if count == self._num_frames:
            self._data[count:] = self._data[count - 1]
            count = len(self._data)
        self._target.written(count)
        with self._news:
            self._num_ready = count
            self._news.notify_all()

    def begun(self) -> NDArray[np.uint8] | None:
        """Return the memory for all frames once it is there; None: it is an image, which is whole at once.

        Raises:
            VlrtError: what ended the decoding.
        """
        with self._news:
            self._news.wait_for(lambda: self._data is not None or self._ended)
        if self._ended:
            self._frames.result()
        return self._data

    def wait(self, count: int) -> None:
        """Return once the first `count` frames are there.

        Raises:
            VlrtError: what ended the decoding, even where these frames are there.
        """
        with self._news:
            self._news.wait_for(lambda: self._num_ready >= count or self._ended)
        if self._ended:
            self._frames.result()

    def whole(self) -> Frames:
        """Return the video once it is decoded, without what fills the last temporal patch."""
        return self._frames.result()


def _load(view: View, model: config.Model, target: Target, admit: Admit, check: Callable[[], None]) -> Frames:
    frames = video.load(
        view.video,
        model.video,
        model.vision,
        num_frames=view.num_frames,
        fps=view.fps,
        target=target,
        admit=admit,
        check=check,
    )
    if isinstance(view.video, Frames):
        admit(len(frames.data), *preprocess.target_size(frames, model.video, model.vision))
    return frames


def _shown(
    frames: Frames, grid_thw: tuple[int, int, int], model: config.Model, kept: NDArray[np.bool_] | None = None
) -> Shown:
    seconds = preprocess.seconds_per_temporal_patch(frames, model.vision)
    return Shown(prompt.Media(frames.is_image, grid_thw, seconds), len(frames.data), frames.warnings, kept)
