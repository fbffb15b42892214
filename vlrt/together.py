"""Answers to several questions at once, about one video or several: read, thought over and answered abreast.

Each pass over the weights serves all of them. Knows which questions go together, and that one that fails or is stopped
leaves the others alone; not how a sequence goes on (`lanes.py`), nor what an answer is (`memory.py`).
"""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import prompt
from vlrt.answer import Answer, Clock, drain
from vlrt.backends.base import Backend
from vlrt.errors import ConfigError, Stopped, VlrtError
from vlrt.kv_cache import TRUNK, KVCache
from vlrt.lanes import Abreast, Lane
from vlrt.memory import Memory, replacement, video_end
from vlrt.request import Request

MAX_LANES = 16  # each question's slots are looked through for each other's, so that more gain little
MAX_BYTES = 512 * 1024**2  # of slots that one batch takes beyond those of its videos; copies of those count


@dataclass
class Asked:
    """A question that waits for its answer.

    Attributes:
        memory: of its video.
        request: the question.
        clock: its own; what is done for a batch counts whole for each of it.
        result: what came of it.
        built: its prompt, once it is known.
    """

    memory: Memory
    request: Request
    clock: Clock
    result: Answer | VlrtError | None = None
    built: prompt.Prompt = field(init=False, repr=False)


def answer_all(backend: Backend, tokenizer: prompt.Tokenizer, questions: Sequence[Asked]) -> None:
    """Give each question its result; nobody else may ask about their videos meanwhile.

    Questions go together in batches of MAX_LANES and MAX_BYTES at most; where the backend has no lanes, or what is
    read of a video depends on the question, one by one.
    """
    batch: list[Asked] = []
    for asked in questions:
        if not asked.memory.is_shared:
            _answer_one(asked)
            continue
        try:
            asked.memory.settle(asked.clock)
            asked.built = asked.memory.build(asked.request)
        except VlrtError as error:
            asked.result = error
            continue
        if batch and not (backend.has_lanes and _fits([*batch, asked], backend, tokenizer)):
            _Batch(backend, tokenizer, batch).answer()
            batch = []
        batch.append(asked)
    if batch:
        _Batch(backend, tokenizer, batch).answer()


def check_names(given: Mapping[str, Any], number: int, accepted: Iterable[str], always: Sequence[str]) -> None:
    """Refuse arguments of a question that there are not, and questions that lack some.

    Raises:
        ConfigError: it names them.
    """
    if wrong := sorted(set(given) - set(accepted)) or [name for name in always if name not in given]:
        raise ConfigError(
            f"question {number} has wrong or missing arguments: {', '.join(wrong)}; accepted: "
            f"{', '.join(sorted(accepted))}, of which {' and '.join(always)} must be there"
        )


def raise_first(found: Iterable[Answer | VlrtError | None]) -> None:
    """Raise the first error among results, if there is one."""
    for result in found:
        if isinstance(result, VlrtError):
            raise result


def num_slots(batch: Sequence[Asked], backend: Backend, tokenizer: prompt.Tokenizer) -> int:
    """Return how many slots a batch takes beyond those of its videos, copies of which count where it has several."""
    videos = {id(asked.memory): video_end(asked.built, backend.model) for asked in batch}
    own = sum(
        len(asked.built.ids) - videos[id(asked.memory)] + asked.request.room(backend.model, tokenizer)
        for asked in batch
    )
    return own + (sum(videos.values()) if len(videos) > 1 else 0)


def _fits(batch: Sequence[Asked], backend: Backend, tokenizer: prompt.Tokenizer) -> bool:
    decoder = backend.model.decoder
    slot_bytes = 8 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim  # keys and values, float32
    return len(batch) <= MAX_LANES and num_slots(batch, backend, tokenizer) * slot_bytes <= MAX_BYTES


def _answer_one(asked: Asked) -> None:
    try:
        asked.result = drain(asked.memory.answer(asked.request, asked.clock))
    except VlrtError as error:
        asked.result = error


class _Batch:
    """Questions that go together, and their lanes."""

    def __init__(self, backend: Backend, tokenizer: prompt.Tokenizer, asked: list[Asked]) -> None:
        self._backend, self._tokenizer, self._asked = backend, tokenizer, asked
        self._memories = list({id(one.memory): one.memory for one in asked}.values())

    def answer(self) -> None:
        """Give each question its result."""
        if len(self._asked) == 1:
            return _answer_one(self._asked[0])
        try:
            self._answer()
        except BaseException as error:
            for memory in self._memories:
                memory.forget()
            if not isinstance(error, VlrtError):
                raise
            for one in self._living():
                one.result = error
        finally:
            for memory in self._memories:
                memory.rewind()
        for one in self._living():  # its prompt begins in another way than those of the other questions
            _answer_one(one)
        return None

    def _answer(self) -> None:
        first = self._read_videos()
        going = [one for one in self._living() if one.memory.has(one.built)]
        if not going:
            return
        with _counted("prefill", going):
            lanes = self._lanes(going)
        latents = self._reason(going, lanes)
        spoken: dict[int, Generator[str, None, Answer]] = {}
        for index, (one, lane) in enumerate(zip(going, lanes, strict=True)):
            reused = 0 if one in first else lane.context.start
            spoken[index] = one.memory.conclude(
                lane, one.request, one.built, reused, latents.get(index), one.clock, paced=True
            )
        said = 0
        while spoken:
            writing = [i for i in spoken if going[i].request.writes and said < going[i].request.max_tokens]
            if writing:
                with _counted("answer", [going[i] for i in spoken]):
                    Abreast(self._backend, [lanes[i] for i in writing]).step()
            said += 1
            for index, pieces in list(spoken.items()):
                try:
                    next(pieces)
                except StopIteration as stop:
                    going[index].result = stop.value
                except VlrtError as error:
                    going[index].result = error
                if going[index].result is not None:
                    del spoken[index]

    def _read_videos(self) -> list[Asked]:
        """Have each video read that was not; return the questions that this was done for."""
        first = []
        for memory in self._memories:
            about = [one for one in self._asked if one.memory is memory]

            def check(about: list[Asked] = about) -> None:
                if not self._living(about):
                    raise Stopped("nobody waits for an answer about this video")

            with _counted("prefill", about), contextlib.suppress(Stopped):
                check()
                if not memory.knows(about[0].built, check):
                    first.append(about[0])
        return first

    def _lanes(self, going: list[Asked]) -> list[Lane]:
        """Make a lane for each question and read its prompt."""
        backend, memories = self._backend, list({id(one.memory): one.memory for one in going}.values())
        room = num_slots(going, backend, self._tokenizer)
        cache: KVCache = memories[0].cache(room) if len(memories) == 1 else backend.prepare(room)
        trunks = {}
        for number, memory in enumerate(memories):
            if len(memories) > 1:
                cache.take(memory.cache(0), number * TRUNK)
            trunks[id(memory)] = number * TRUNK, backend.remember(memory.pooled)
        lanes = []
        for index, one in enumerate(going):
            trunk, seen = trunks[id(one.memory)]
            own = one.request.room(backend.model, self._tokenizer)
            lanes.append(Lane(backend, one.memory.rest(one.built), own, cache, trunk + index + 1, seen))
        Abreast(backend, lanes).read()
        return lanes

    def _reason(self, going: list[Asked], lanes: list[Lane]) -> dict[int, NDArray[np.float32]]:
        """Return the latents of the questions that have some: abreast where all have as many, else one by one."""
        plan, found = self._backend.model.latent, {}
        thinking = [index for index, one in enumerate(going) if one.request.reasoning == "latent"]
        with _counted("latents", [going[index] for index in thinking]):
            whole = [i for i in thinking if going[i].request.latents is None and going[i].request.early_exit is None]
            if whole and plan is not None and plan.stop != "end_token":
                made = Abreast(self._backend, [lanes[index] for index in whole]).reason()
                found = dict(zip(whole, made, strict=True))
            for index in thinking:
                if index not in found:
                    one, lane = going[index], lanes[index]
                    ablated, certain = replacement(self._backend, one.request), one.memory.certain(lane, one.request)
                    found[index] = lane.reason(lane.context, ablated, certain)
        return found

    def _living(self, asked: Sequence[Asked] | None = None) -> list[Asked]:
        """Return the questions that still wait; those that were stopped get that as their result."""
        for one in self._asked:
            if one.result is None:
                try:
                    one.clock.check()
                except Stopped as error:
                    one.result = error
        return [one for one in (self._asked if asked is None else asked) if one.result is None]


@contextlib.contextmanager
def _counted(stage: str, asked: Sequence[Asked]) -> Iterator[None]:
    """Count what the block takes towards a stage of each question."""
    start = time.perf_counter()
    try:
        yield
    finally:
        for one in asked:
            one.clock.seconds[stage] += time.perf_counter() - start
