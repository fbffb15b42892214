"""A video that is still going on: frames are appended to it, and questions are asked at any time.

Knows which frames the model is shown, and what of the work done for them stands when more come. Knows no camera, no
file, and not how a question is answered.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vlrt import config, preprocess, prompt, request
from vlrt.answer import Clock
from vlrt.backends.base import Array, Backend
from vlrt.encoding import encode
from vlrt.errors import ConfigError, VideoError
from vlrt.generate import Writer, read
from vlrt.memory import SLACK, Memory, Shown, build, video_end
from vlrt.sampling import frame_size
from vlrt.session import Clip
from vlrt.video import Frames

_ROUNDING = 1e-6  # of a temporal patch, in what fits a window: 30 s at 29.97 fps are not one patch short


@dataclass(frozen=True)
class Window:
    """How much of a stream is kept, counted from its newest frame: so many seconds, so many video tokens, or all."""

    seconds: float | None = None
    tokens: int | None = None

    @classmethod
    def of(cls, seconds: float | None, tokens: int | None) -> "Window":
        """Return a window.

        Raises:
            ConfigError: both are given, or one is no number above 0.
        """
        if seconds is not None and tokens is not None:
            raise ConfigError(
                f"window_seconds = {seconds} and window_tokens = {tokens} were both given; pass only one of them"
            )
        for name, value, kinds in (("window_seconds", seconds, int | float), ("window_tokens", tokens, int)):
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < math.inf
            ):
                raise ConfigError(f"{name} is {value!r}; accepted: a number above 0, window_tokens a whole one")
        return cls(seconds, tokens)

    def max_patches(self, seconds_per_patch: float, tokens_per_patch: int) -> int | None:
        """Return how many temporal patches it holds; None: any number.

        Raises:
            ConfigError: not even one.
        """
        if self.seconds is not None:
            most = math.floor(self.seconds / seconds_per_patch + _ROUNDING)
            given, least = f"window_seconds is {self.seconds:g}", f"{seconds_per_patch:g}"
        elif self.tokens is not None:
            most = self.tokens // tokens_per_patch
            given, least = f"window_tokens is {self.tokens}", str(tokens_per_patch)
        else:
            return None
        if most < 1:
            raise ConfigError(f"{given}; accepted: what one temporal patch takes, {least}, or more")
        return most


class LiveMemory(Memory):
    """What was computed about the frames of a stream so far, as `memory.Memory` has it of a whole video.

    Args:
        backend: reads and writes.
        model: of the backend.
        tokenizer: of the model.
        fps: of the frames.
        window: what is kept of them.

    Raises:
        ConfigError: the window is shorter than a temporal patch.
        VideoError: fps is not a number above 0.
    """

    def __init__(
        self,
        backend: Backend,
        model: config.Model,
        tokenizer: prompt.Tokenizer,
        fps: float,
        window: Window,
    ) -> None:
        self._like = Frames.from_array(np.zeros((1, 1, 1, 3), np.uint8), fps=fps)  # the frames, but for their data
        self._seconds = preprocess.seconds_per_temporal_patch(self._like, model.vision)
        if window.seconds is not None:
            window.max_patches(self._seconds, 1)
        super().__init__(backend, model, tokenizer, Shown(prompt.Media(False, (0, 0, 0), self._seconds), 0), None)
        self._window = window
        self._steps = model.vision.temporal_patch_size
        self._size = 0, 0  # height and width at which the frames are shown
        self._most: int | None = None  # temporal patches that the window holds
        self._num_patches = 0  # whole ones, whose tokens come first
        self._waiting = np.zeros((0, 1, 1, 3), np.uint8)  # frames, fewer than a temporal patch has
        self._num_read = 0  # tokens that stand in the cache where they should
        self._unread = self._moved = False

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds, roughly."""
        return 0 if self._tokens is None else super().num_bytes

    def extend(self, array: ArrayLike) -> None:
        """Append frames. See `LiveClip.extend`; where frames are refused, nothing has changed."""
        data = self._checked(array)
        count, over = divmod(len(self._waiting) + len(data), self._steps)
        total = self._num_patches + count + (over > 0)
        dropped = 0 if self._most is None else max(0, total - self._most)
        self._check_fits(total - dropped)
        gone = min(dropped, self._num_patches)
        data = self._shown_frames(data, (dropped - gone) * self._steps)  # came and went with nobody asking in between
        whole, waiting = np.split(data, [len(data) - over])
        encoded = [self._encoded(whole)] if len(whole) else []
        kept = self._num_patches - gone
        if kept:
            size = self._tokens_per_patch
            encoded.insert(0, self._tokens[gone * size : self._num_patches * size])
        self._tokens = self.backend.join(encoded) if encoded else None
        if dropped:
            self._moved = self._cache is not None
        self._num_read = 0 if dropped else min(self._num_read, kept * self._tokens_per_patch)
        self._num_patches, self._waiting = kept + len(whole) // self._steps, waiting.copy()
        self._show(self._num_patches, self._num_patches * self._steps)
        if len(whole) and not self._moved:
            self.read()

    def settle(self, clock: Clock) -> None:
        """Encode frames that wait, and read what was not read yet.

        Raises:
            ConfigError: no frame has come yet.
            Stopped: the clock says so.
        """
        with clock("vision"):
            self._fill()
        with clock("prefill"):
            if self._unread or self._cache is None:
                self.read(clock.check)

    def read(self, check: Callable[[], None] | None = None) -> None:
        """Read what does not stand in the cache yet, up to the video's end.

        Args:
            check: called before each pass over a chunk; it raises where reading is to end.
        """
        built = prompt.build(self._tokenizer, self._model, "?", [self.shown.media], reasoning="direct")
        stop, start = video_end(built, self._model), 0
        cache, self._cache = self._cache, None  # on an error nobody knows what is in it
        if cache is not None:
            start = built.spans[0].start + self._num_read
            cache.rewind(cache.length - start)
        if cache is None or cache.capacity < stop:
            larger = self.backend.prepare(stop + max(SLACK, stop // 2))
            if cache is not None:
                larger.take(cache)
            cache = larger
        whole = read(self.backend, built, self._tokens)
        Writer(self.backend, whole.upto(stop).after(start), 0, cache, check)
        self._keep(cache, built.ids[:stop], None, whole.pooled)
        self._num_read, self._unread, self._moved = built.spans[0].num_tokens, False, False

    @property
    def _tokens_per_patch(self) -> int:
        _, height, width = self._grid(1)
        return height * width // self._model.vision.spatial_merge_size**2

    def _encoded(self, data: NDArray[np.uint8]) -> Array:
        """Run the vision tower over whole temporal patches of frames at the model's size."""
        return encode(self.backend, self._model, data, Clock())

    def _grid(self, num_patches: int) -> tuple[int, int, int]:
        side = self._model.vision.patch_size
        return num_patches, self._size[0] // side, self._size[1] // side

    def _show(self, num_patches: int, num_frames: int) -> None:
        self.shown = Shown(prompt.Media(False, self._grid(num_patches), self._seconds), num_frames)
        self._unread = True

    def _fill(self) -> None:
        """Show frames that wait too: the last one is repeated, as at the end of a file."""
        if not self._num_patches and not len(self._waiting):
            raise ConfigError("no frame has come yet; extend the stream, then ask")
        if not len(self._waiting) or self.shown.media.grid_thw[0] > self._num_patches:
            return
        last = np.repeat(self._waiting[-1:], self._steps - len(self._waiting), axis=0)
        encoded = self._encoded(np.concatenate([self._waiting, last]))
        self._tokens = encoded if self._tokens is None else self.backend.join([self._tokens, encoded])
        self._show(self._num_patches + 1, self._num_patches * self._steps + len(self._waiting))

    def _checked(self, array: ArrayLike) -> NDArray[np.uint8]:
        """Return frames like those before, or refuse them."""
        like, data = self._like, Frames.from_array(array, fps=self._like.sample_fps).data
        if not self._num_patches and not len(self._waiting):
            self._begin(*data.shape[:3])
        elif data.shape[1:3] != (like.source_height, like.source_width):
            raise VideoError(
                f"the frames are {data.shape[1]} x {data.shape[2]} pixels, the first ones were {like.source_height} x "
                f"{like.source_width}; accepted: frames of one size. Resize them, or open another stream"
            )
        return data

    def _begin(self, count: int, height: int, width: int) -> None:
        """Decide at which size frames are shown, and how many temporal patches of it the window holds."""
        if self._window.seconds is not None:
            count = max(1, math.floor(self._window.seconds * self._like.sample_fps + _ROUNDING))
        self._size = frame_size(height, width, count, self._model.video, self._model.vision)
        self._like = replace(self._like, source_height=height, source_width=width)
        self._most = self._window.max_patches(self._seconds, self._tokens_per_patch)
        if self._most is not None:
            self._check_fits(self._most)

    def _check_fits(self, num_patches: int) -> None:
        """Refuse more temporal patches than the model has positions for."""
        asked = request.check(self._model, self._tokenizer, "?", max_tokens=1)
        try:
            build(self._tokenizer, self._model, asked, prompt.Media(False, self._grid(num_patches), self._seconds))
        except ConfigError as error:
            raise ConfigError(
                f"a stream of {num_patches * self._steps} frames is too long: {error}. Open it with a smaller "
                "window_seconds or window_tokens"
            ) from error

    def _shown_frames(self, data: NDArray[np.uint8], skipped: int) -> NDArray[np.uint8]:
        """Return the frames that wait and new ones at the size at which they are shown, without the first `skipped`."""
        sized = preprocess.at_size(data[max(0, skipped - len(self._waiting)) :], self._size)
        waiting = self._waiting[skipped:]
        return np.concatenate([waiting, sized]) if len(waiting) else sized


class LiveClip(Clip):
    """A video that is still going on; `Runtime.open_stream` makes one. Questions are answered as `Clip` does.

    Answers are those that `Runtime.ask` gives about all frames so far, or those in the window, opened at once by
    `Frames.from_array` at the size at which this stream shows them. It is saved as what it is at the moment; what
    `load_video` returns then is a clip to which nothing can be appended.
    """

    def extend(self, frames: ArrayLike) -> None:
        """Append frames, once the question under way is answered: a question sees all frames appended before it.

        A thread that reads a camera and may not wait hands its frames to another one, which appends what has come;
        many at once take less than one by one.

        The first frames decide at which size all are shown: that of a video with as many frames as `window_seconds`
        holds, or else as these are (`sampling.frame_size`). Two frames (`temporal_patch_size`) make up a temporal
        patch. One without a partner waits; a question sees it twice, as models see the last frame of an odd number, and
        when its partner comes that patch is computed anew.

        What it costs: each new temporal patch is encoded and read once, whatever came before it. With a window, whole
        temporal patches are dropped, the oldest first. Every frame then stands at another time, and none has seen what
        was dropped, so that the decoder reads the window again with the next question (`Answer.timings["prefill"]`);
        the vision tower does not. Frames that are appended until that question are encoded, not read.

        Args:
            frames: [T, H, W, 3] uint8, RGB, T at least 1, H and W as of the first; copied where they are kept.

        Raises:
            VideoError: another shape, size or dtype, or no frame.
            ConfigError: more frames than the model has positions for, a window that holds no temporal patch of this
                size, a closed clip, or a stream of an answer that this thread has left open. In all of these cases
                nothing was appended.
        """
        with self._mine() as memory:
            assert isinstance(memory, LiveMemory)
            memory.extend(frames)
