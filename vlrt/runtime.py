"""Opens a bundle and answers questions about videos: decode -> preprocess -> vision -> prefill -> latents -> answer.

The one place where all stages meet. Knows no engine from within: `backends` run the stages.
"""

import os
import threading
from collections.abc import Generator, Hashable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import prompt, reduction, request, saved_clip, session
from vlrt.admission import Admission
from vlrt.answer import Answer, Clock, Stream, drain
from vlrt.backends import select
from vlrt.backends.base import Backend
from vlrt.bundle import Bundle
from vlrt.content import Source, stamp
from vlrt.errors import ConfigError, VlrtError
from vlrt.live import LiveClip, LiveMemory, Window
from vlrt.memory import Memory
from vlrt.reduction import Reduction
from vlrt.request import Request
from vlrt.saved_clip import Origin
from vlrt.seeing import View, see
from vlrt.session import Clip, Recent
from vlrt.together import MAX_BYTES, Asked, answer_all, check_names, raise_first

MAX_THREADS = 1024  # more is a slip, and the engine takes minutes to start them
VIDEO_CACHE_BYTES = 256 * 1024**2
ASKED_ALWAYS = ("video", "question")  # arguments of `Runtime.ask`
ASKED = {"video", "num_frames", "fps", "reduce", *session.ASKED}


class Runtime:
    """A loaded model. One serves several threads: each call has a KV cache of its own, graphs are shared."""

    def __init__(
        self,
        backend: Backend,
        tokenizer: prompt.Tokenizer,
        *,
        video_cache_bytes: int = VIDEO_CACHE_BYTES,
        origin: Origin | None = None,
        memory_bytes: int | None = None,
        kv_cache: str = "fp32",
    ) -> None:
        """Wrap a loaded backend. `Runtime.open` makes one from a bundle."""
        self.model = backend.model
        self.tokenizer = tokenizer
        self._backend: Backend | None = backend
        self._recent = recent = Recent(video_cache_bytes)
        self._origin = origin
        self._packs = kv_cache == "int8"
        backend.keeps_spare = backend.keeps_spare and not self._packs  # where memory is to be saved

        def let_go() -> None:
            recent.clear()
            backend.give_back()

        self._admission = Admission(self.model, tokenizer, backend.plan_memory, memory_bytes, let_go)

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str = "auto",
        device: str = "auto",
        threads: int | None = None,
        video_cache_bytes: int = VIDEO_CACHE_BYTES,
        memory_bytes: int | None = None,
        kv_cache: str = "fp32",
    ) -> "Runtime":
        """Load a bundle; each file's hash is checked when it is loaded.

        Args:
            path: a directory that `vlrt export` wrote.
            backend: "ort", "torch", or "auto": the one that the bundle was written for.
            device: "cpu", "cuda" (backend "torch" alone), or "auto": a GPU where there is one that the backend can use.
            threads: of one graph run; None: one per core that this process may use. Of PyTorch: in the whole process.
            video_cache_bytes: of what was computed about the videos asked about last, so that another question about
                one of them takes less; 0: nothing is kept. Beside that, the memory of keys and values that were let go
                last serves the next video, unless kv_cache is "int8".
            memory_bytes: that one question may take above the loaded bundle, kept videos not counted; one that would
                take more is refused before its video is decoded. None: what the machine, or the control group that
                the process is in, has available by then.
            kv_cache: "fp32", or "int8" (backend ort alone): keys and values of open and remembered videos are kept in
                int8 between questions: with heads of 64, in 0.27 of the memory. They are float32 while one is answered.

        Raises:
            BundleError: not a bundle, or damaged.
            BackendUnavailable: the backend cannot run here, or not this bundle.
            ConfigError: a setting is out of range.
        """
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= MAX_THREADS):
            raise ConfigError(f"threads is {threads!r}; accepted: a whole number from 1 to {MAX_THREADS}")
        if not isinstance(video_cache_bytes, int) or video_cache_bytes < 0:
            raise ConfigError(f"video_cache_bytes is {video_cache_bytes!r}; accepted: a whole number, 0 or more")
        if memory_bytes is not None and (not isinstance(memory_bytes, int) or memory_bytes < 1):
            raise ConfigError(f"memory_bytes is {memory_bytes!r}; accepted: a whole number, 1 or more, or None")
        if kv_cache not in ("fp32", "int8"):
            raise ConfigError(f"kv_cache is {kv_cache!r}; accepted: 'fp32', 'int8'")
        bundle = Bundle.open(path)
        if kv_cache == "int8" and bundle.backend != "ort":
            raise ConfigError(f"kv_cache 'int8' is for bundles of ort; this one is of {bundle.backend}: use 'fp32'")
        for name in prompt.FILES:
            if (bundle.path / name).exists():
                bundle.file(name)
        loaded = select.load(bundle, backend, device, threads)
        origin = Origin(bundle.seal, bundle.backend, bundle.precision)
        tokenizer = prompt.Tokenizer.open(bundle.path)
        return cls(
            loaded,
            tokenizer,
            video_cache_bytes=video_cache_bytes,
            origin=origin,
            memory_bytes=memory_bytes,
            kv_cache=kv_cache,
        )

    def ask(
        self,
        video: Source,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        num_frames: int | None = None,
        fps: float | None = None,
        latents: NDArray[np.float32] | str | None = None,
        early_exit: float | None = None,
        reduce: Reduction | None = None,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Answer a question about a video.

        Args:
            video: what `vlrt.video.load` takes: path or bytes of a video or image, a list of image paths, or Frames.
            question: any text; control tokens in it are read as plain text.
            choices: the answers to choose from, scored as the model's next words; None: the model writes freely.
            reasoning: "latent", "direct" or "cot"; None: "latent" where the model has latents, else "direct".
            max_tokens: end the answer (a chain of thought included) after so many; None: 128, or 1,024 for "cot".
            min_tokens: do not end it before so many.
            num_frames: sample so many frames; None: the bundle's setting. Frames are taken as they are.
            fps: sample so many frames per second; None: the bundle's setting. Frames are taken as they are.
            latents: for ablations: [L, C] float32 to inject in place of the model's own (L may be 0), or "dummy" or
                "noise" (`latent.ablate`).
            early_exit: with choices and latents: make no more latents once a choice has this probability, see
                `Answer.scores`; the answer is that of a model with so many latents. None: make all.
            reduce: which of the video's tokens the model is not shown, at the price of some accuracy; None: it is
                shown all. What is remembered of a video is remembered for one reduction.
            timeout_seconds: after which nothing more is begun; what is under way, a pass over some of the video or a
                step, is ended first. None: it takes what it takes.
            stop: an event: set by another thread, it ends the answer in the same way.

        Raises:
            Stopped: the time was over, or the event was set.
            VideoError: the video cannot be used.
            ConfigError: a setting is out of range, the prompt is longer than the model's positions, or the video takes
                more memory than there is (`memory_bytes`).
        """
        asked = request.check(
            self.model,
            self.tokenizer,
            question,
            choices=choices,
            reasoning=reasoning,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            latents=latents,
            early_exit=early_exit,
        )
        clock = Clock.of(timeout_seconds, stop)
        return drain(self._answer(View(video, num_frames, fps, reduction.check(reduce)), asked, clock))

    def stream(
        self,
        video: Source,
        question: str,
        *,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        num_frames: int | None = None,
        fps: float | None = None,
        reduce: Reduction | None = None,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> Stream:
        """Answer as `ask` does, giving out the text as it is written; nothing runs before the first piece is taken.

        Raises:
            ConfigError: a setting is out of range; `ask`'s other errors come with the first piece.
        """
        asked = request.check(
            self.model, self.tokenizer, question, reasoning=reasoning, max_tokens=max_tokens, min_tokens=min_tokens
        )
        clock = Clock.of(timeout_seconds, stop)
        return Stream(self._answer(View(video, num_frames, fps, reduction.check(reduce)), asked, clock))

    def ask_many(self, questions: Sequence[Mapping[str, Any]], *, return_errors: bool = False) -> list[Any]:
        """Answer many questions; each video is read once for all about it, and they are answered side by side.

        Answers equal those of `ask` token for token in fp32; in int8 a row is rounded with regard to those beside it.
        Their times are those of the batch that they went in (`together.answer_all`); `timeout_seconds` counts from when
        their video is looked at.

        Args:
            questions: arguments of `ask`, one mapping each: {"video": ..., "question": ..., "choices": ...}.
            return_errors: put a VlrtError in the place of an answer that cannot be had; else the first one is raised.

        Returns:
            An Answer for each question, in the order of the questions.

        Raises:
            VlrtError: see `ask`; arguments that `ask` does not have are refused before anything is answered.
        """
        groups: dict[Hashable, list[int]] = {}
        before = [stamp(question.get("video", b"")) for question in questions]
        for number, question in enumerate(questions):
            check_names(question, number, ASKED, ASKED_ALWAYS)
            sampling = question.get("num_frames"), question.get("fps")
            view = View(question["video"], *sampling, reduction.check(question.get("reduce")))
            name = view.name()
            groups.setdefault(object() if name is None else name, []).append(number)
        found: list[Any] = [None] * len(questions)
        batch: dict[int, Asked] = {}
        memories: dict[Hashable, Memory] = {}

        def settle() -> None:
            answer_all(self._open_backend(), self.tokenizer, list(batch.values()))
            for number, asked in batch.items():
                found[number] = asked.result
            for key, memory in memories.items():
                self._remember(key, memory)
            batch.clear()
            memories.clear()
            if not return_errors:
                raise_first(found)

        for key, numbers in groups.items():
            memory = self._recent.take(key)
            for number in numbers:
                try:
                    batch[number], seen = self._asked(memory, **questions[number])
                except VlrtError as error:
                    found[number] = error
                    continue
                if memory is not None or stamp(questions[number]["video"]) == before[number]:
                    memory = seen
            if memory is not None:
                memories[key] = memory
            if sum(memory.num_bytes for memory in memories.values()) > MAX_BYTES:
                settle()
        settle()
        return found

    def _asked(
        self,
        memory: Memory | None,
        video: Source,
        question: str,
        num_frames: int | None = None,
        fps: float | None = None,
        reduce: Reduction | None = None,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
        **settings: Any,
    ) -> tuple[Asked, Memory]:
        """Return a question to be answered, and what was computed about its video, for the next."""
        clock = Clock.of(timeout_seconds, stop)
        request_ = request.check(self.model, self.tokenizer, question, **settings)
        if memory is None:
            memory = self._see(View(video, num_frames, fps, reduction.check(reduce)), request_, clock)
        return Asked(memory, request_, clock), memory

    def open_video(
        self,
        video: Source,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        reduce: Reduction | None = None,
    ) -> Clip:
        """Read a video once, for many questions.

        What is kept are keys and values of every layer for each of its tokens. It is of no use beyond this Runtime, but
        may outlive its `close`.

        Args:
            video: as in `ask`.
            num_frames: as in `ask`.
            fps: as in `ask`.
            reduce: as in `ask`. With `keep` below 1 each question reads the video's tokens anew: which ones depends on
                the question.

        Raises:
            VideoError: the video cannot be used.
            ConfigError: a setting is out of range, or the video is longer than the model's positions.
        """
        asked = request.check(self.model, self.tokenizer, "?", max_tokens=1)
        memory = self._see(View(video, num_frames, fps, reduction.check(reduce)), asked, Clock())
        memory.read()
        return Clip(memory, self.model, self.tokenizer, self._origin)

    def load_video(self, path: str | os.PathLike[str]) -> Clip:
        """Open a clip that `Clip.save` wrote: its video is neither decoded nor read again.

        Raises:
            ClipError: it is none, damaged, or computed by another bundle or backend.
            ConfigError: the runtime is closed, or was not opened from a bundle.
        """
        backend = self._open_backend()
        if self._origin is None:
            raise ConfigError("this runtime was not opened from a bundle; use Runtime.open to load clips")
        memory = saved_clip.load(path, backend, self.model, self.tokenizer, self._origin)
        return Clip(memory, self.model, self.tokenizer, self._origin)

    def open_stream(
        self, *, fps: float, window_seconds: float | None = None, window_tokens: int | None = None
    ) -> LiveClip:
        """Open a video that is still going on: `LiveClip.extend` appends frames, and tells what they cost.

        Args:
            fps: frames per second that will be appended; none of them is left out.
            window_seconds: keep the newest frames of so many seconds.
            window_tokens: keep the newest frames of so many video tokens. Give one of the two, or none: then frames can
                be appended until the model's positions are full.

        Raises:
            ConfigError: the window is out of range or shorter than one temporal patch, both are given, or the runtime
                is closed.
            VideoError: fps is not a number above 0.
        """
        window = Window.of(window_seconds, window_tokens)
        memory = LiveMemory(self._open_backend(), self.model, self.tokenizer, fps, window)
        return LiveClip(memory, self.model, self.tokenizer, self._origin)

    def close(self) -> None:
        """Let the model go, once answers under way in other threads have ended. Later calls raise ConfigError."""
        self._backend = None
        self._recent.clear()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, view: View, asked: Request, clock: Clock) -> Generator[str, None, Answer]:
        """Run all stages that were not run for an earlier question; yield text as it is written, return the Answer."""
        self._open_backend()
        with clock("decode"):
            before = stamp(view.video)
            key = view.name() if self._recent.max_bytes else None
        memory = None if key is None else self._recent.take(key)
        if memory is None:
            memory = self._see(view, asked, clock)
            if stamp(view.video) != before:  # what was decoded may be something else than what has this name
                key = None
        try:
            return (yield from memory.answer(asked, clock))
        finally:
            if key is not None:
                self._remember(key, memory)

    def _remember(self, key: Hashable, memory: Memory) -> None:
        if self._backend is not None:  # else it was closed meanwhile
            self._recent.put(key, memory)

    def _see(self, view: View, asked: Request, clock: Clock) -> Memory:
        """Decode and encode a video about which a question is to be answered; unless that cannot fit."""
        backend, admission = self._open_backend(), self._admission
        admit = admission.of(asked, view.reduce)
        seen = see(
            backend, self.model, view, clock, admit, lambda shown: admission.check_shown(asked, shown, view.reduce)
        )
        return Memory(
            backend, self.model, self.tokenizer, seen.shown, seen.tokens, seen.pooled, view.reduce, packs=self._packs
        )

    def _open_backend(self) -> Backend:
        backend = self._backend
        if backend is None:
            raise ConfigError("this Runtime is closed; open the bundle again")
        return backend
