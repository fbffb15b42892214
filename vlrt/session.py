"""Videos that stay open: one that an application holds, and those that a runtime remembers for a while.

Knows how long what was computed is kept, and that one question at a time is asked of it; not how it is answered.
"""

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Generator, Hashable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config, prompt, request, saved_clip
from vlrt.answer import Answer, Clock, Stream, drain
from vlrt.errors import ConfigError, VlrtError
from vlrt.memory import Memory
from vlrt.request import Request
from vlrt.saved_clip import Origin, Saved
from vlrt.together import Asked, answer_all, check_names, raise_first

ASKED = {"question", "choices", "reasoning", "max_tokens", "min_tokens", "latents", "early_exit"}
ASKED |= {"timeout_seconds", "stop"}


class Recent:
    """What was computed about the videos that were asked about last, as many as fit.

    A memory is taken out while a question is answered, so that two questions never share one.

    Args:
        max_bytes: of all memories together; 0: none is kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self._held = max_bytes, 0
        self._kept: OrderedDict[Hashable, tuple[Memory, int]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, key: Hashable) -> Memory | None:
        """Return what is kept under a key, if anything, and keep it no more."""
        with self._lock:
            memory, size = self._kept.pop(key, (None, 0))
            self._held -= size
            return memory

    def put(self, key: Hashable, memory: Memory) -> None:
        """Keep a memory, in place of those that were used longest ago; not where it takes more than all may."""
        size = memory.num_bytes
        with self._lock:
            self._held -= self._kept.pop(key, (None, 0))[1]
            if size > self.max_bytes:
                return
            self._kept[key] = memory, size
            self._held += size
            while self._held > self.max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self._held -= freed

    def clear(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._kept.clear()
            self._held = 0


class Clip:
    """A video that stays open for many questions; `Runtime.open_video` makes one. Questions are answered in turn.

    Args:
        memory: what was computed about it.
        model: of the runtime.
        tokenizer: of the runtime.
        origin: what computed it; None: it cannot be saved.
    """

    def __init__(
        self, memory: Memory, model: config.Model, tokenizer: prompt.Tokenizer, origin: Origin | None = None
    ) -> None:
        self._memory: Memory | None = memory
        self._model, self._tokenizer, self._origin = model, tokenizer, origin
        self._turn = threading.Lock()
        self._asking: int | None = None  # the thread whose question is answered now

    def ask(
        self,
        question: str,
        *,
        choices: Sequence[str] | None = None,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        latents: NDArray[np.float32] | str | None = None,
        early_exit: float | None = None,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> Answer:
        """Answer a question; the arguments, and the answer, are those of `Runtime.ask`.

        Raises:
            ConfigError: a setting is out of range, the prompt is longer than the model's positions, or it is closed.
        """
        asked = request.check(
            self._model,
            self._tokenizer,
            question,
            choices=choices,
            reasoning=reasoning,
            max_tokens=max_tokens,
            min_tokens=min_tokens,
            latents=latents,
            early_exit=early_exit,
        )
        return drain(self._answer(asked, Clock.of(timeout_seconds, stop)))

    def stream(
        self,
        question: str,
        *,
        reasoning: prompt.Reasoning | None = None,
        max_tokens: int | None = None,
        min_tokens: int = 0,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
    ) -> Stream:
        """Answer as `ask` does, giving out the text as it is written. Others wait until it is read or closed.

        Raises:
            ConfigError: a setting is out of range; `ask`'s other errors come with the first piece.
        """
        asked = request.check(
            self._model, self._tokenizer, question, reasoning=reasoning, max_tokens=max_tokens, min_tokens=min_tokens
        )
        return Stream(self._answer(asked, Clock.of(timeout_seconds, stop)))

    def save(self, path: str | os.PathLike[str]) -> Saved:
        """Keep what was computed in a file, once the question under way is answered; `Runtime.load_video` reads it.

        The file takes what the clip takes in memory. It is of use to the same bundle alone, and holds the video's
        content in a form that the model reads: keep it as you keep the video. It is written to a temporary sibling and
        renamed; what killed processes had left of such is removed, and told.

        Args:
            path: a new one, or that of a saved clip, which is replaced.

        Raises:
            ClipError: something else is there, it cannot be written to, or the disk is full; what was there stays.
            ConfigError: the clip is closed, or its runtime was not opened from a bundle.
        """
        with self._mine() as memory:
            if self._origin is None:
                raise ConfigError("this runtime was not opened from a bundle; use Runtime.open to save its clips")
            if memory.shown.kept is not None or not memory.is_shared:
                raise ConfigError("this clip was opened with reduce=, which is not kept in files; open it without")
            return saved_clip.save(path, memory, self._origin)

    def ask_many(self, questions: Sequence[Mapping[str, Any]], *, return_errors: bool = False) -> list[Any]:
        """Answer many questions side by side; see `Runtime.ask_many`.

        Args:
            questions: arguments of `ask`, one mapping each.
            return_errors: put a VlrtError in the place of an answer that cannot be had; else the first one is raised.

        Raises:
            VlrtError: see `ask`; arguments that `ask` does not have are refused before anything is answered.
        """
        for number, question in enumerate(questions):
            check_names(question, number, ASKED, ("question",))
        with self._mine() as memory:
            found: list[Any] = []
            for question in questions:
                try:
                    found.append(self._asked(memory, **question))
                except VlrtError as error:
                    found.append(error)
            answer_all(memory.backend, self._tokenizer, [one for one in found if isinstance(one, Asked)])
        found = [one.result if isinstance(one, Asked) else one for one in found]
        if not return_errors:
            raise_first(found)
        return found

    def close(self) -> None:
        """Let the memory go, once the question under way is answered. Later questions raise ConfigError."""
        with self._turn:
            self._memory = None

    def __enter__(self) -> "Clip":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _asked(
        self,
        memory: Memory,
        question: str,
        timeout_seconds: float | None = None,
        stop: threading.Event | None = None,
        **settings: Any,
    ) -> Asked:
        clock = Clock.of(timeout_seconds, stop)
        return Asked(memory, request.check(self._model, self._tokenizer, question, **settings), clock)

    def _answer(self, asked: Request, clock: Clock) -> Generator[str, None, Answer]:
        with self._mine() as memory:
            return (yield from memory.answer(asked, clock))

    @contextlib.contextmanager
    def _mine(self) -> Iterator[Memory]:
        """Wait for this thread's turn."""
        if self._asking == threading.get_ident():
            raise ConfigError("a stream of this video is still open; read it to its end, or close it, and ask again")
        with self._turn:
            if self._memory is None:
                raise ConfigError("this video is closed; open it again")
            self._asking = threading.get_ident()
            try:
                yield self._memory
            finally:
                self._asking = None
