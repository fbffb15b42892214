"""Sequences that go on side by side in one cache: one pass over the weights serves all of them.

Each lane sees what its sequence begins with and what is its own. Knows the steps of prefill, latents and answers; no
question and no video.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlrt import latent, positions
from vlrt.backends.base import Backend, Words
from vlrt.backends.greedy import HostWords
from vlrt.generate import Context, Writer
from vlrt.kv_cache import KVCache

Floats = NDArray[np.float32]


class Lane(Writer):
    """A sequence beside others; what it begins with is in the cache, and `read` reads its context.

    Args:
        backend: one with lanes.
        context: what is read.
        room: slots beyond it.
        cache: shared; with slots for all.
        number: its lane, as in `KVCache`.
        memory: what `Backend.remember` made of the pooled video tokens.

    Attributes:
        context: as given.
        number: as given.
    """

    def __init__(self, backend: Backend, context: Context, room: int, cache: KVCache, number: int, memory: Any) -> None:
        self.number, self.context = number, context
        self._next: Floats | None = None
        super().__init__(backend, context, room, cache)
        self._memory = memory

    @property
    def pending(self) -> list[int]:
        """What was answered and not fed yet."""
        return self._pending

    def feed_apart(self, branches: Sequence[Sequence[int]]) -> list[Any]:
        """See `Writer`: in turn, since lanes go on from trunks alone."""
        return self._feed_in_turn(branches)

    def _read(self, context: Context, check: Any) -> None:
        """`read` does it, for all lanes at once."""

    def _decode(self, embeds: Floats, cos: Floats, sin: Floats) -> Any:
        lanes = np.full(len(embeds), self.number, np.int32)
        return self._backend.decode(self._cache, embeds, cos, sin, lanes)

    def _word(self, words: Words, banned: Sequence[int]) -> int:
        if self._next is None:
            return super()._word(words, banned)
        logits, self._next = self._next, None
        assert isinstance(words, HostWords), "backends with lanes have their logits in host memory"
        return words.pick(logits, banned)


class Abreast:
    """Steps of several lanes at once, by arrays [S, B, C]: see `latent.Steps`.

    Args:
        backend: of the lanes.
        lanes: B of one cache.
    """

    def __init__(self, backend: Backend, lanes: Sequence[Lane]) -> None:
        self._backend, self._lanes = backend, lanes
        self._cache = lanes[0].cache

    def read(self) -> None:
        """Read the context of each lane."""
        contexts = [lane.context for lane in self._lanes]
        embeds = self._backend.join([context.embeds for context in contexts])
        at = np.concatenate([context.positions for context in contexts], axis=1)
        lengths = [len(context.embeds) for context in contexts]
        numbers = np.repeat(self._numbers(), lengths)
        cos, sin = positions.mrope_cos_sin(at, self._backend.model.decoder)
        ends, size = np.cumsum(lengths) - 1, self._backend.prefill_chunk
        for start in range(0, len(embeds), size):
            chunk = slice(start, start + size)
            hidden = self._backend.decode(self._cache, embeds[chunk], cos[chunk], sin[chunk], numbers[chunk])
            for lane, end in zip(self._lanes, ends - start, strict=True):
                if 0 <= end < len(hidden):
                    lane.last_hidden = hidden[end : end + 1]

    def reason(self) -> list[Floats]:
        """Roll the latents [L, C] of each lane out; the rollout must not end by what the model says."""
        plan, backend, count = self._backend.model.latent, self._backend, len(self._lanes)
        assert plan is not None, "the caller asks for latents of models that have them"
        end = np.repeat(backend.embed(np.array([plan.end_token_id], np.int64))[:, None], count, axis=1)
        queries = backend.queries()
        if queries is not None:
            queries = np.repeat(queries[:, None], count, axis=1)
        start = np.stack([lane.last_hidden for lane in self._lanes], axis=1)
        latents, hidden = latent.roll_out(plan, self, start, end, queries)
        for index, lane in enumerate(self._lanes):
            lane.last_hidden = hidden[:, index]
        return [latents[:, index] for index in range(count)]

    def step(self) -> None:
        """Feed what each lane has answered last, and make the logits of what it says next."""
        late = [lane for lane in self._lanes if lane.pending]
        if late:
            ids = np.array([lane.pending[0] for lane in late], np.int64)
            hidden = Abreast(self._backend, late).feed(self._backend.embed(ids)[None])
            for index, lane in enumerate(late):
                lane.last_hidden = hidden[:, index]
                lane.take_back()
        logits = self._backend.logits(np.concatenate([lane.last_hidden for lane in self._lanes]))
        for lane, row in zip(self._lanes, logits, strict=True):
            lane._next = row

    def feed(self, embeds: Floats) -> Floats:
        """Append embeds [S, B, C] at the next text positions of each lane; return their hidden states [S, B, C]."""
        count, width = len(embeds), embeds.shape[-1]
        first = np.array([lane._position for lane in self._lanes], np.int64)
        at = (first + np.arange(count)[:, None]).reshape(-1)
        tables = positions.mrope_cos_sin(np.stack([at, at, at]), self._backend.model.decoder)
        numbers = np.tile(self._numbers(), count)
        hidden: Floats = self._backend.decode(self._cache, embeds.reshape(-1, width), *tables, numbers)
        for lane in self._lanes:
            lane._position += count
        return hidden.reshape(embeds.shape)

    def rewind(self, count: int) -> None:
        """Take the last `count` positions of each lane back."""
        self._cache.rewind(count * len(self._lanes))
        for lane in self._lanes:
            lane._position -= count

    def inject(self, hidden: Floats) -> Floats:
        """Map hidden states [L, B, C] to latents [L, B, C]."""
        made, by_memory = np.empty_like(hidden), dict[int, list[int]]()
        for index, lane in enumerate(self._lanes):
            by_memory.setdefault(id(lane._memory), []).append(index)
        for members in by_memory.values():
            rows = hidden[:, members]
            found = self._backend.inject(rows.reshape(-1, rows.shape[-1]), self._lanes[members[0]]._memory)
            made[:, members] = found.reshape(rows.shape)
        return made

    def join(self, parts: list[Floats]) -> Floats:
        """Concatenate along S."""
        return np.concatenate(parts)

    def _numbers(self) -> NDArray[np.int32]:
        return np.array([lane.number for lane in self._lanes], np.int32)
