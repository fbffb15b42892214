"""Prefill -> latents -> answer, greedily, on any backend. Knows no file, no text and no model.

Source of the scheme: docs/latents.md. Decoding is greedy: the same question gives the same answer.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import choices, config, latent, positions, prompt
from vlrt.backends.base import NO_NUMBER, Array, Backend, Words
from vlrt.errors import BundleError, ConfigError
from vlrt.kv_cache import KVCache

Replace = Callable[[NDArray[np.float32]], NDArray[np.float32]]

_NO_NUMBERS = "the model computes NaN here: its answer would mean nothing; export it again, or report the checkpoint"


@dataclass(frozen=True)
class Context:
    """What a model reads before it reasons: all of it, or what follows something that it has read.

    Attributes:
        embeds: [S, C], text embeddings with the video tokens in their places.
        positions: [3, S] int64, M-RoPE.
        next_position: position of the next text token.
        pooled: [T_v, C], the video tokens, mean-pooled over space per temporal patch; one row of zeros without a video.
        start: number of positions before these.
    """

    embeds: Array
    positions: NDArray[np.int64]
    next_position: int
    pooled: Array
    start: int = 0

    @property
    def end(self) -> int:
        """Number of positions, those before the context included."""
        return self.start + len(self.embeds)

    def upto(self, stop: int) -> "Context":
        """Return what stands before position `stop`; its next position is not known."""
        size = stop - self.start
        return Context(self.embeds[:size], self.positions[:, :size], -1, self.pooled, self.start)

    def after(self, start: int) -> "Context":
        """Return what stands from position `start` on."""
        size = start - self.start
        return Context(self.embeds[size:], self.positions[:, size:], self.next_position, self.pooled, start)


def read(
    backend: Backend,
    built: prompt.Prompt,
    video_tokens: Array,
    kept: NDArray[np.bool_] | None = None,
    pooled: Array = None,
) -> Context:
    """Put video tokens in their places among the embedded ids, and say where everything stands.

    Args:
        backend: embeds the ids.
        built: ids and spans.
        video_tokens: [N, C], those that are kept, of all spans one after the other.
        kept: [N_v], which tokens of the spans those are: the others are left out, and none moves; None: all.
        pooled: [T_v, C], see `Context`; None: that of the tokens, all of which are kept.
    """
    cfg = backend.model
    kept = np.ones(sum(span.num_tokens for span in built.spans), np.bool_) if kept is None else kept
    stays, done = np.ones(len(built.ids), np.bool_), 0
    for span in built.spans:
        stays[span.start : span.start + span.num_tokens] = kept[done : done + span.num_tokens]
        done += span.num_tokens
    embeds = backend.embed(built.ids[stays])
    parts, done = [], 0
    for span in built.spans:
        start = int(stays[: span.start].sum())
        size = int(stays[span.start : span.start + span.num_tokens].sum())
        tokens = video_tokens[done : done + size]
        embeds[start : start + size] = tokens
        if pooled is None:
            parts.append(pool(tokens, span.grid_thw[0]))
        done += size
    if pooled is None:
        pooled = backend.join(parts) if parts else 0 * embeds[:1]
    at, after = _positions(cfg, built)
    return Context(embeds, at[:, stays], after, pooled)


def pool(tokens: Array, steps: int) -> Array:
    """Average video tokens [N_v, C] of `steps` temporal patches over space; return [steps, C]."""
    return tokens.reshape(steps, -1, tokens.shape[-1]).mean(1)


def read_rest(backend: Backend, built: prompt.Prompt, pooled: Array, start: int, num_dropped: int = 0) -> Context:
    """Return what follows position `start` of a prompt, behind all of its media.

    Args:
        backend: embeds the ids.
        built: ids and spans.
        pooled: as `read` returned it for these media.
        start: where it begins.
        num_dropped: tokens before it that were left out.
    """
    at, after = _positions(backend.model, built)
    return Context(backend.embed(built.ids[start:]), at[:, start:], after, pooled, start - num_dropped)


def _positions(cfg: config.Model, built: prompt.Prompt) -> tuple[NDArray[np.int64], int]:
    return positions.mrope_positions(
        built.ids,
        built.spans,
        tokens_per_second=cfg.vision.tokens_per_second,
        spatial_merge_size=cfg.vision.spatial_merge_size,
        rule=cfg.text_position_after_video,
    )


def check_length(model: config.Model, length: int, room: int, advice: str = "") -> None:
    """Refuse a prompt of `length` tokens that, with `room` more, exceeds the positions that the model was made for.

    The message ends in `advice`.

    Raises:
        ConfigError: it does.
    """
    limit = model.decoder.max_positions
    if length + room > limit:
        raise ConfigError(
            f"prompt and answer take up to {length} + {room} positions; this model has {limit}: ask with fewer or "
            f"smaller frames, or with a lower max_tokens{advice}"
        )


class Writer:
    """A sequence under way: its cache, and where the next text token stands. Steps of rollouts, choices and answers."""

    def __init__(
        self,
        backend: Backend,
        context: Context,
        room: int,
        cache: KVCache | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        """Read a context into a cache, and leave `room` slots beyond it.

        Args:
            backend: reads.
            context: what is read.
            room: slots.
            cache: what stands before the context, with as many slots; None: a new one, for a context from 0 on.
            check: called before each pass over a chunk of the context; it raises where reading is to end.

        Raises:
            ConfigError: context and room exceed the positions that the model was made for.
        """
        check_length(backend.model, context.end, room)
        self._backend = backend
        self._memory: Any = None
        self._cache = backend.prepare(context.end + room) if cache is None else cache
        self._position = context.next_position
        self._pending: list[int] = []
        self.log_probabilities: list[float] = []  # of what `answer` decided, step by step, among what it might have
        self.last_hidden = self._read(context, check)

    @property
    def cache(self) -> KVCache:
        """What was read and written so far."""
        return self._cache

    def feed(self, embeds: Array) -> Array:
        """Append embeds [S, C] at the next text positions; return their hidden states [S, C]."""
        at = np.arange(self._position, self._position + len(embeds), dtype=np.int64)
        tables = positions.mrope_cos_sin(np.stack([at, at, at]), self._backend.model.decoder)
        hidden = self._decode(embeds, *tables)
        self._position += len(embeds)
        return hidden

    def feed_tokens(self, token_ids: Sequence[int]) -> Array:
        """Append tokens; return their hidden states [S, C]."""
        return self.feed(self._backend.embed(np.array(token_ids, np.int64)))

    def feed_apart(self, branches: Sequence[Sequence[int]]) -> list[Array]:
        """Feed tokens of each branch as if the others were not there, and take them back; in one pass where lanes are.

        Returns:
            hidden states [S, C] of each.
        """
        lengths = [len(branch) for branch in branches]
        if len(branches) == 1 or sum(lengths) > self._backend.prefill_chunk or not self._backend.has_lanes:
            return self._feed_in_turn(branches)
        embeds = self._backend.embed(np.concatenate([np.array(branch, np.int64) for branch in branches]))
        at = self._position + np.concatenate([np.arange(length) for length in lengths])
        tables = positions.mrope_cos_sin(np.stack([at, at, at]), self._backend.model.decoder)
        lanes = np.repeat(np.arange(1, len(branches) + 1, dtype=np.int32), lengths)
        hidden = self._backend.decode(self._cache, embeds, *tables, lanes)
        self._cache.rewind(len(embeds))
        ends = np.cumsum(lengths)
        return [hidden[end - length : end] for end, length in zip(ends, lengths, strict=True)]

    def _feed_in_turn(self, branches: Sequence[Sequence[int]]) -> list[Array]:
        found = []
        for branch in branches:
            found.append(self.feed_tokens(branch))
            self.rewind(len(branch))
        return found

    def rewind(self, count: int) -> None:
        """Take the last `count` text positions back."""
        self._cache.rewind(count)
        self._position -= count

    def inject(self, hidden: Array) -> Array:
        """Map hidden states [L, C] to latents [L, C]."""
        return self._backend.inject(hidden, self._memory)

    def join(self, parts: list[Array]) -> Array:
        """Concatenate rows."""
        return self._backend.join(parts)

    def reason(
        self, context: Context, replace: Replace | None = None, certain: Callable[[Array], bool] | None = None
    ) -> Array:
        """Roll the latents out after the start token and return them.

        Args:
            context: the context that was read.
            replace: for ablations: given the model's own latents [L, C] returns the ones to go on with.
            certain: see `latent.roll_out`.
        """
        plan = self._backend.model.latent
        assert plan is not None, "the caller asks for latents of models that have them"
        end = self._backend.embed(np.array([plan.end_token_id], np.int64))
        self._memory = self._backend.remember(context.pooled)
        latents, hidden = latent.roll_out(
            plan,
            self,
            self.last_hidden,
            end,
            self._backend.queries(),
            lambda hidden: self._predicts(hidden, plan),
            certain,
        )
        if replace is not None:
            self.rewind(len(latents) + 1)
            latents = self._backend.lift(replace(self._backend.lower(latents)))
            hidden = latent.feed_given(self, latents, end)
        self.last_hidden = hidden
        return latents

    def answer(
        self, *, max_tokens: int, min_tokens: int, eos: Sequence[int], seen: Sequence[int] = (), penalty: float = 1.0
    ) -> Iterator[int]:
        """Yield the ids of the answer, without the token that ends it.

        Args:
            max_tokens: end after so many.
            min_tokens: until there are so many, an end token is not taken.
            eos: ids that end the answer.
            seen: ids that the prompt has.
            penalty: logits of ids that are seen or written are divided by it, negative ones multiplied
                (arXiv 1909.05858, as transformers does).

        Raises:
            BundleError: the model computes no numbers.
        """
        words = self._backend.words(seen, penalty)
        for count in range(max_tokens):
            token_id = self._word(words, eos if count < min_tokens else ())
            if token_id == NO_NUMBER:
                raise BundleError(_NO_NUMBERS)
            self.log_probabilities.append(words.log_probability)
            if token_id in eos:
                return
            self._pending = [token_id]
            yield token_id

    def take_back(self) -> None:
        """Forget the token that `answer` yielded last."""
        self._pending = []

    def score(self, answers: Sequence[Sequence[int]], lead: Sequence[int] = (), hidden: Array = None) -> list[float]:
        """Return the log probability of each answer, given that it is one of them.

        Args:
            answers: ids of each, ending in an end token.
            lead: ids to append before the answer.
            hidden: [1, C], the state that predicts it, without a lead; None: that of the last token.

        Raises:
            BundleError: the model computes no numbers.
        """
        hidden = self._settle(lead) if hidden is None else hidden
        scores = choices.log_probabilities(answers, hidden, self, self._backend.row_logits)
        if np.isnan(scores).any():
            raise BundleError(_NO_NUMBERS)
        return scores

    def _word(self, words: Words, banned: Sequence[int]) -> int:
        """Return the next token, or NO_NUMBER."""
        return words(self._settle([]), banned)

    def _settle(self, more: Sequence[int]) -> Array:
        """Feed what was answered but not fed yet, and `more`; return the last hidden state [1, C]."""
        ids, self._pending = [*self._pending, *more], []
        if ids:
            self.last_hidden = self.feed_tokens(ids)[-1:]
        return self.last_hidden

    def _read(self, context: Context, check: Callable[[], None] | None) -> Array:
        """Prefill in chunks; return the hidden state [1, C] of the last position."""
        assert self._cache.length == context.start
        cos, sin = positions.mrope_cos_sin(context.positions, self._backend.model.decoder)
        hidden: Array = None
        size = self._backend.prefill_chunk
        for start in range(0, len(context.embeds), size):
            if check is not None:
                check()
            chunk = slice(start, start + size)
            hidden = self._decode(context.embeds[chunk], cos[chunk], sin[chunk])
        return hidden[-1:]

    def _decode(self, embeds: Array, cos: NDArray[np.float32], sin: NDArray[np.float32]) -> Array:
        return self._backend.decode(self._cache, embeds, cos, sin)

    def _predicts(self, hidden: Array, plan: Any) -> bool:
        return self._backend.words()(hidden) == int(plan.end_token_id)
