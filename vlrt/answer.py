"""What a question comes back with: the Answer, its counts and times, and the stream of its text.

Knows no model and no engine.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt.errors import ConfigError, Stopped


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    num_frames: int  # of the video, after sampling; the repeats that fill the last temporal patch are not counted
    video_tokens: int  # that were read
    dropped_tokens: int  # of the video, which a reduction left out
    prompt_tokens: int  # video tokens included
    reused_tokens: int  # of the prompt, which had been read for an earlier question about the video
    latents: int
    answer_tokens: int  # a written chain of thought included
    peak_host_memory_bytes: int  # of the process so far; 0 where the platform does not tell


@dataclass(frozen=True)
class Answer:
    """The answer to a question about a video.

    Attributes:
        text: the answer; the choice, where choices were given.
        token_ids: what the model wrote, without the token that ended it; of a choice, its ids.
        choice: the likeliest choice, or None without choices.
        scores: probability of each choice where the model may say nothing but one of them: at every word, among the
            words with which the choices go on (`choices.log_probabilities`), at the bundle's `choice_temperature`; they
            add up to 1.
        confidence: probability of the choice, among `scores`. Of free text the geometric mean of the probabilities of
            its tokens and of the one that ended it, each among those that could have stood there (after the repetition
            penalty, end tokens barred up to min_tokens); None after a chain of thought.
        finished: whether the model ended the answer; False where max_tokens cut it off.
        reasoning: "latent", "direct" or "cot".
        thought: the chain of thought, or None.
        latents: [L, C] float32, or None.
        usage: counts.
        timings: seconds per stage, in order: decode, preprocess, vision, prefill, latents, answer, total. Frames of
            long videos are decoded while earlier ones go through preprocess and vision: `decode` is what the answer
            waited for frames beside that, so that the stages add up to no more than the total.
        warnings: what was odd about the input, one sentence each.
    """

    text: str
    token_ids: tuple[int, ...]
    choice: str | None
    scores: dict[str, float] | None
    confidence: float | None
    finished: bool
    reasoning: str
    thought: str | None
    latents: NDArray[np.float32] | None
    usage: Usage
    timings: dict[str, float]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values; of the latents only their shape, as `latents_shape`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "latents"}
        values["usage"] = dict(vars(self.usage))
        values["latents_shape"] = None if self.latents is None else list(self.latents.shape)
        return values


class Stream:
    """The text of an answer as it is written. Iterate it to its end, then read `answer`."""

    def __init__(self, pieces: Generator[str, None, Answer]) -> None:
        """Wrap a generator of text pieces that returns the Answer."""
        self._pieces = pieces
        self._answer: Answer | None = None

    def __iter__(self) -> Iterator[str]:
        """Yield text pieces."""
        answer = yield from self._pieces
        self._answer = answer or self._answer  # a second look finds nothing left

    @property
    def answer(self) -> Answer:
        """The whole answer.

        Raises:
            ConfigError: the stream was not read to its end.
        """
        if self._answer is None:
            raise ConfigError("the stream has no answer yet; iterate it to its end first")
        return self._answer

    def close(self) -> None:
        """Stop the answer where it is."""
        self._pieces.close()


def drain(pieces: Generator[str, None, Answer]) -> Answer:
    """Run an answer to its end."""
    while True:
        try:
            next(pieces)
        except StopIteration as stop:
            answer: Answer = stop.value
            return answer


@dataclass
class Clock:
    """Seconds per stage; and whether a question is still to be answered, which every stage and every step of it asks.

    Attributes:
        seconds: per stage.
        started: by `time.perf_counter`.
        deadline: likewise, after which nothing more is begun; None: there is none.
        stop: set by whoever wants no answer any more.
    """

    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("decode", "preprocess", "vision", "prefill", "latents", "answer"), 0.0)
    )
    started: float = field(default_factory=time.perf_counter)
    deadline: float | None = None
    stop: threading.Event | None = None

    @classmethod
    def of(cls, timeout_seconds: float | None, stop: threading.Event | None) -> "Clock":
        """Return a clock that starts now.

        Raises:
            ConfigError: timeout_seconds is no number above 0.
        """
        clock = cls(stop=stop)
        if timeout_seconds is not None:
            if not isinstance(timeout_seconds, int | float) or not timeout_seconds > 0:
                raise ConfigError(f"timeout_seconds is {timeout_seconds!r}; accepted: a number above 0, or None")
            clock.deadline = clock.started + timeout_seconds
        return clock

    def check(self) -> None:
        """Return where the question is still to be answered.

        Raises:
            Stopped: it is not.
        """
        if self.stop is not None and self.stop.is_set():
            raise Stopped("the answer was cancelled before it was there")
        if self.deadline is not None and time.perf_counter() > self.deadline:
            limit = self.deadline - self.started
            raise Stopped(f"the answer was not there within timeout_seconds = {limit:g}; give it more, or ask for less")

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Count what the block takes towards a stage.

        Raises:
            Stopped: the question is not to be answered any more.
        """
        self.check()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def timings(self) -> dict[str, float]:
        """Return seconds per stage, and since the start as `total`."""
        return {**self.seconds, "total": time.perf_counter() - self.started}


def peak_host_memory_bytes() -> int:
    """Return the most memory that this process has held so far, mapped files included; 0 where nothing tells.

    Linux tells in VmHWM; its ru_maxrss also counts what the parent held before it started this process.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
