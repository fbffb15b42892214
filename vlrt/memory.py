"""What was computed about one video, and answers about it: questions are appended, answered, and taken back.

The prompt up to the video's end is read once. Knows how a question is answered where video tokens are there; no file,
no vision tower, and no engine from within.
"""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import config, prompt
from vlrt.answer import Answer, Clock, Usage, peak_host_memory_bytes
from vlrt.backends.base import Array, Backend
from vlrt.calibration import temper
from vlrt.errors import Stopped
from vlrt.generate import Context, Replace, Writer, check_length, read, read_rest
from vlrt.kv_cache import KVCache
from vlrt.latent import ablate
from vlrt.packed_cache import PackedCache, pack
from vlrt.reduction import NONE, Reduction, related
from vlrt.request import ANSWER_TAG, Request

SLACK = 512  # slots for questions and answers that an opened video begins with; they grow where a question takes more


@dataclass(frozen=True)
class Shown:
    """What a model is shown of a video.

    Attributes:
        media: its size in patches, and its times.
        num_frames: that were sampled.
        warnings: what was odd about the source.
        kept: [N_v], which of its tokens there are, whatever is asked; None: all.
    """

    media: prompt.Media
    num_frames: int
    warnings: tuple[str, ...] = ()
    kept: NDArray[np.bool_] | None = None


class Memory:
    """What was computed about a video: its tokens, and keys and values of the prompt up to its end.

    Args:
        backend: reads and writes.
        model: of the backend.
        tokenizer: of the model.
        shown: what was encoded.
        tokens: [N, C], of the vision tower, those that there are.
        pooled: [T_v, C], of all tokens, see `generate.Context`; None: that of `tokens`, none of which was dropped.
        reduce: what of them is read for a question.
        packs: whether keys and values are kept in int8 between questions, where all read the same. They are rounded
            before the first one, so that the same question has the same answer whenever it is asked; the cache must be
            in host memory.
    """

    def __init__(
        self,
        backend: Backend,
        model: config.Model,
        tokenizer: prompt.Tokenizer,
        shown: Shown,
        tokens: Array,
        pooled: Array = None,
        reduce: Reduction = NONE,
        *,
        packs: bool = False,
    ) -> None:
        self.shown, self.backend = shown, backend
        self._model, self._tokenizer, self._tokens = model, tokenizer, tokens
        self._ids: NDArray[np.int64] = np.zeros(0, np.int64)  # what the cache holds
        self._kept: NDArray[np.bool_] | None = None  # of the video's tokens
        self._prefix = 0  # positions of it that do not depend on the question
        self._cache: KVCache | None = None
        self._pooled, self._reduce = pooled, reduce
        self._packs = packs and self.is_shared
        self._packed: PackedCache | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds, roughly."""
        rows, width = self._tokens.shape
        kept = self._cache or self._packed
        return 4 * int(rows) * int(width) + (kept.num_bytes if kept is not None else 0)

    def read(self) -> None:
        """Read the prompt up to the video's end, before there is a question; nothing where it depends on that."""
        if self.is_shared:
            self.knows(prompt.build(self._tokenizer, self._model, "?", [self.shown.media], reasoning="direct"))
            self.rewind()

    @property
    def is_shared(self) -> bool:
        """Whether all questions read the same of the video."""
        return self._reduce.keep == 1

    def settle(self, clock: Clock) -> None:
        """Do what was put off until somebody asks: of a whole video, nothing."""

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return what it holds, by name, on the host; `restore` is its inverse.

        ids [n] int64, tokens [N_v, C] and pooled [T_v, C] float32, and the parts of the cache. It is read anew where an
        error left nothing.
        """
        self.settle(Clock())
        if self._cache is None and self._packed is None:
            self.read()
        lower, parts = self.backend.lower, self.cache(0).parts()
        self.rewind()
        return {"ids": self._ids, "tokens": lower(self._tokens), "pooled": lower(self._pooled), **parts}

    @classmethod
    def restore(
        cls,
        backend: Backend,
        model: config.Model,
        tokenizer: prompt.Tokenizer,
        shown: Shown,
        cache: KVCache,
        arrays: Mapping[str, NDArray[Any]],
    ) -> "Memory":
        """Return a memory of what `arrays` returned, in a cache that is empty."""
        memory = cls(backend, model, tokenizer, shown, backend.lift(arrays["tokens"]))
        cache.fill(arrays)
        memory._keep(cache, arrays["ids"], None, backend.lift(arrays["pooled"]))
        return memory

    @property
    def pooled(self) -> Array:
        """Video tokens [T_v, C], mean-pooled over space, once the prompt has been read."""
        return self._pooled

    def build(self, asked: Request) -> prompt.Prompt:
        """Return the prompt of a question, where all read the same of the video: see `build`."""
        return build(self._tokenizer, self._model, asked, self.shown.media, num_dropped(self.shown.kept))

    def has(self, built: prompt.Prompt) -> bool:
        """Return whether a prompt has been read up to the video's end, where all read the same of that."""
        return self._has(built, self.shown.kept)

    def knows(self, built: prompt.Prompt, check: Callable[[], None] | None = None) -> bool:
        """Read a prompt up to the video's end where that has not been read; return whether it had been.

        `check` is called before each pass over a chunk of it, and raises where reading is to end.
        """
        if self.has(built):
            return True
        stop, kept, self._cache = video_end(built, self._model), self.shown.kept, None
        whole = read(self.backend, built, self._tokens, kept, self._pooled)
        shared = whole.upto(stop - num_dropped(kept))
        cache = self.backend.prepare(shared.end + SLACK)
        Writer(self.backend, shared, 0, cache, check)
        if self._packs:
            self._packed = pack(cache)
            cache.rewind(cache.length)
            self._packed.unpack(cache)
        self._keep(cache, built.ids[:stop], kept, whole.pooled)
        return False

    def cache(self, room: int) -> KVCache:
        """Return what was read, in a cache with `room` slots beyond it."""
        if self._cache is None:
            assert self._packed is not None, "the caller has it read before"
            self._cache = self.backend.prepare(self._packed.length + room)
            self._packed.unpack(self._cache)
        stop = self._cache.length
        if self._cache.capacity < stop + room:
            larger = self.backend.prepare(stop + room + SLACK)
            larger.take(self._cache)
            self._cache = larger
        return self._cache

    def rest(self, built: prompt.Prompt) -> Context:
        """Return what follows what was read of a prompt."""
        return read_rest(self.backend, built, self._pooled, len(self._ids), num_dropped(self._kept))

    def forget(self) -> None:
        """Have the prompt read anew: what is in the cache is not known."""
        self._cache = None

    def rewind(self) -> None:
        """Take back what follows the video; where it is kept in int8, the rest as well."""
        if self._packed is not None:
            self._cache = None
        elif self._cache is not None:
            self._cache.rewind(self._cache.length - self._prefix)

    def answer(self, asked: Request, clock: Clock) -> Generator[str, None, Answer]:
        """Answer a question, yielding text as it is written; return the Answer. One question at a time.

        Raises:
            ConfigError: the prompt is longer than the model's positions.
            Stopped: the clock says so.
        """
        self.settle(clock)
        with clock("prefill"):
            kept, tokens = self._choose(asked.question)
            built = build(self._tokenizer, self._model, asked, self.shown.media, num_dropped(kept))
        try:
            with clock("prefill"):
                reused = self._has(built, kept)
                writer, context = self._writer(built, kept, tokens, asked.room(self._model, self._tokenizer), clock)
            latents = None
            if asked.reasoning == "latent":
                with clock("latents"):
                    made = writer.reason(context, replacement(self.backend, asked), self.certain(writer, asked))
                    latents = self.backend.lower(made)
            return (yield from self.conclude(writer, asked, built, reused * context.start, latents, clock))
        except (GeneratorExit, Stopped):  # between two steps: whoever read the stream has left, or its time is over
            raise
        except BaseException:
            self.forget()
            raise
        finally:
            self.rewind()

    def conclude(
        self,
        writer: Writer,
        asked: Request,
        built: prompt.Prompt,
        reused: int,
        latents: NDArray[np.float32] | None,
        clock: Clock,
        *,
        paced: bool = False,
    ) -> Generator[str, None, Answer]:
        """Answer where everything before the answer has been read; yield text as it is written, return the Answer.

        Args:
            writer: has read it.
            asked: the question.
            built: its prompt.
            reused: how many of the prompt's tokens had been read before.
            latents: [L, C], or None.
            clock: counts.
            paced: yield after every token, "" where it ends no character.
        """
        written: list[int] = []
        lead: list[int] = []
        if asked.writes:
            lead = yield from self._write(writer, asked, built.ids.tolist(), written, clock, paced)
        chances: list[float] | None = None
        if asked.choices:
            with clock("answer"):
                chances = temper(writer.score(asked.choice_ids, lead), self._model.choice_temperature)
        return self._finish(asked, built, reused, latents, written, chances, writer, clock)

    def certain(self, writer: Writer, asked: Request) -> Callable[[Array], bool] | None:
        """Return what tells whether a choice is certain enough for no more latents, given the state before it."""
        limit = asked.early_exit
        if limit is None:
            return None

        def certain(hidden: Array) -> bool:
            log_scores = writer.score(asked.choice_ids, hidden=hidden)
            return max(temper(log_scores, self._model.choice_temperature)) >= limit

        return certain

    def _choose(self, question: str) -> tuple[NDArray[np.bool_] | None, Array]:
        """Return which of the video's tokens are read for a question, [N_v] (None: all), and those."""
        if self._reduce.keep == 1:
            return self.shown.kept, self._tokens
        asked = self.backend.embed(np.array(self._tokenizer.encode(question), np.int64))
        lower = self.backend.lower
        picked = np.flatnonzero(related(lower(self._tokens), lower(asked), self._reduce.keep))
        there = np.arange(len(self._tokens)) if self.shown.kept is None else np.flatnonzero(self.shown.kept)
        kept = np.zeros(len(self._tokens) if self.shown.kept is None else len(self.shown.kept), np.bool_)
        kept[there[picked]] = True
        return kept, self._tokens[picked]

    def _writer(
        self, built: prompt.Prompt, kept: NDArray[np.bool_] | None, tokens: Array, room: int, clock: Clock
    ) -> tuple[Writer, Context]:
        """Read a prompt: what follows the video where the rest has been read, else all of it."""
        stop, length = video_end(built, self._model), len(built.ids) - num_dropped(kept)
        if not self._has(built, kept) and not self._packs:
            self._cache = None
            context = read(self.backend, built, tokens, kept, self._pooled)
            writer = Writer(self.backend, context, room, check=clock.check)
            self._keep(writer.cache, built.ids[:stop], kept, context.pooled)
            return writer, context
        check_length(self._model, length, room)
        if self._packs:
            self.knows(built, clock.check)
        cache, context = self.cache(len(built.ids) - stop + room), self.rest(built)
        return Writer(self.backend, context, room, cache, clock.check), context

    def _has(self, built: prompt.Prompt, kept: NDArray[np.bool_] | None) -> bool:
        same = np.array_equal(self._ids, built.ids[: video_end(built, self._model)]) and _equal(self._kept, kept)
        return (self._cache is not None or self._packed is not None) and same

    def _keep(self, cache: KVCache, ids: NDArray[np.int64], kept: NDArray[np.bool_] | None, pooled: Array) -> None:
        self._cache, self._ids, self._kept, self._pooled = cache, ids, kept, pooled
        self._prefix = len(ids) - num_dropped(kept)

    def _write(
        self, writer: Writer, asked: Request, seen: list[int], written: list[int], clock: Clock, paced: bool = False
    ) -> Generator[str, None, list[int]]:
        """Write freely, yielding text.

        Before choices, stop where the answer's tag is complete, and return the ids that are missing to make it so: a
        token that runs on beyond the tag is taken back.
        """
        decoder = self._tokenizer.decoder()
        ids = writer.answer(
            max_tokens=asked.max_tokens,
            min_tokens=asked.min_tokens,
            eos=self._model.tokens.eos_token_ids,
            seen=seen,
            penalty=self._model.repetition_penalty,
        )
        text = ""
        while True:
            with clock("answer"):
                token_id = next(ids, None)
                piece = decoder.finish() if token_id is None else decoder.push(token_id)
            before, text = text, text + piece
            if asked.choices and ANSWER_TAG in text and not text.endswith(ANSWER_TAG) and token_id is not None:
                writer.take_back()
                return self._tokenizer.encode(ANSWER_TAG[_overlap(before, ANSWER_TAG) :])
            if token_id is not None:
                written.append(token_id)
            if piece or (paced and token_id is not None):
                yield piece
            if asked.choices and text.endswith(ANSWER_TAG):
                return []
            if token_id is None:
                return self._tokenizer.encode(ANSWER_TAG)

    def _finish(
        self,
        asked: Request,
        built: prompt.Prompt,
        reused: int,
        latents: NDArray[np.float32] | None,
        written: list[int],
        chances: list[float] | None,
        writer: Writer,
        clock: Clock,
    ) -> Answer:
        """Put the answer together."""
        dropped = num_dropped(self._kept)
        text, thought, choice, scores = self._tokenizer.decode(written), None, None, None
        confidence = None if asked.reasoning == "cot" else float(np.exp(np.mean(writer.log_probabilities or [0.0])))
        usage = Usage(
            num_frames=self.shown.num_frames,
            video_tokens=sum(span.num_tokens for span in built.spans) - dropped,
            dropped_tokens=dropped,
            prompt_tokens=len(built.ids) - dropped,
            reused_tokens=reused,
            latents=0 if latents is None else len(latents),
            answer_tokens=len(written),
            peak_host_memory_bytes=peak_host_memory_bytes(),
        )
        if asked.reasoning == "cot":
            thought, text = prompt.split_cot(text)
        if chances is not None:
            confidence, best = max(chances), int(np.argmax(chances))
            text = choice = asked.choices[best]
            scores = dict(zip(asked.choices, chances, strict=True))
            written = self._tokenizer.encode(choice)
        return Answer(
            text=text,
            token_ids=tuple(written),
            choice=choice,
            scores=scores,
            confidence=confidence,
            finished=choice is not None or usage.answer_tokens < asked.max_tokens,
            reasoning=asked.reasoning,
            thought=thought,
            latents=latents,
            usage=usage,
            timings=clock.timings(),
            warnings=self.shown.warnings,
        )


def build(
    tokenizer: prompt.Tokenizer, model: config.Model, asked: Request, media: prompt.Media, dropped: int = 0
) -> prompt.Prompt:
    """Return the prompt of a question about a video, all of the video's tokens in it.

    Raises:
        ConfigError: with its answer, and without the `dropped` tokens, it is longer than the model's positions.
    """
    built = prompt.build(tokenizer, model, asked.question, [media], reasoning=asked.reasoning)
    room = asked.room(model, tokenizer)
    advice = "" if dropped else _frames_that_fit(model, built, room)
    check_length(model, len(built.ids) - dropped, room, advice)
    return built


def num_dropped(kept: NDArray[np.bool_] | None) -> int:
    """Return how many tokens are not kept; None: all are."""
    return 0 if kept is None else int(np.count_nonzero(~kept))


def video_end(built: prompt.Prompt, model: config.Model) -> int:
    """Return how many ids of a prompt do not depend on the question: up to the video's end."""
    last = built.spans[-1]
    stop = last.start + last.num_tokens
    return stop + int(stop < len(built.ids) and built.ids[stop] == model.tokens.vision_end_token_id)


def _frames_that_fit(model: config.Model, built: prompt.Prompt, room: int) -> str:
    """Return the advice how many frames of this size fit the model's positions; "" where not even two do."""
    (span,) = built.spans
    per_step = span.num_tokens // span.grid_thw[0]
    left = model.decoder.max_positions - room - (len(built.ids) - span.num_tokens)
    frames = left // per_step * model.vision.temporal_patch_size
    return f"; {frames} frames of this size fit (num_frames={frames})" if frames > 0 else ""


def _equal(one: NDArray[np.bool_] | None, other: NDArray[np.bool_] | None) -> bool:
    return num_dropped(one) == num_dropped(other) == 0 or np.array_equal(one, other)  # type: ignore[arg-type]


def replacement(backend: Backend, asked: Request) -> Replace | None:
    """Return what an ablation puts in place of the model's own latents."""
    given, plan = asked.latents, backend.model.latent
    if given is None or plan is None:
        return None
    if isinstance(given, np.ndarray):
        return lambda own: given
    pad = backend.lower(backend.embed(np.array([plan.pad_token_id], np.int64)))
    return lambda own: ablate("dummy" if given == "dummy" else "noise", own, pad_embed=pad)


def _overlap(text: str, tag: str) -> int:
    """Return how many characters of a tag the end of a text already has."""
    return next(n for n in range(len(tag), -1, -1) if text.endswith(tag[:n]))
