"""Prefill, answers and positions over a fake backend, whose every state shows a token that is missing or misplaced."""

from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import WIDTH, FakeBackend, fake_model
from vlrt import generate, positions
from vlrt.errors import BundleError, ConfigError
from vlrt.generate import Writer
from vlrt.prompt import Prompt, Span

EOS = (1, 2)
NO_EOS: tuple[int, ...] = ()


def a_prompt(*media, text=5, seed=0):
    """Text, then each medium (is_image, grid_thw, seconds) followed by text."""
    random, spans, length = np.random.default_rng(seed), [], text
    for is_image, grid, seconds in media:
        num_tokens = grid[0] * grid[1] * grid[2] // 4
        spans.append(Span(is_image, length, num_tokens, grid, seconds))
        length += num_tokens + text
    return Prompt(random.integers(0, 200, length), tuple(spans), "")


VIDEO, LONG, IMAGE = (False, (3, 4, 6), 0.7), (False, (9, 2, 2), 1.0), (True, (1, 6, 2), 0.0)


def video_tokens(prompt):
    count = sum(span.num_tokens for span in prompt.spans)
    return np.random.default_rng(1).standard_normal((count, WIDTH)).astype(np.float32)


def a_context(backend, *media, **settings):
    prompt = a_prompt(*media, **settings)
    return generate.read(backend, prompt, video_tokens(prompt))


@dataclass
class ByHand:
    """The same model without a cache: all that was fed is fed again, in one pass, for every token."""

    backend: FakeBackend
    embeds: np.ndarray
    positions: np.ndarray
    next_position: int

    @classmethod
    def of(cls, context):
        """Start from a context, on a backend of its own, so that records of the tested one stay clean."""
        return cls(FakeBackend(), context.embeds, context.positions, context.next_position)

    def feed(self, *ids):
        at = np.arange(self.next_position, self.next_position + len(ids))
        self.embeds = np.concatenate([self.embeds, self.backend.embed(np.array(ids, np.int64))])
        self.positions = np.concatenate([self.positions, np.stack([at] * 3)], axis=1)
        self.next_position += len(ids)
        return self

    def hidden(self):
        tables = positions.mrope_cos_sin(self.positions, self.backend.model.decoder)
        return self.backend.decode(self.backend.prepare(len(self.embeds)), self.embeds, *tables)[-1:]

    def answer(self, max_tokens, min_tokens=0, eos=NO_EOS):
        found = []
        while len(found) < max_tokens:
            logits = self.backend.logits(self.hidden())[0]
            order = [int(i) for i in np.argsort(-logits, kind="stable")]
            token_id = next(i for i in order if not (i in eos and len(found) < min_tokens))
            if token_id in eos:
                break
            found.append(token_id)
            self.feed(token_id)
        return found


@pytest.mark.parametrize("media", [(), (VIDEO,), (VIDEO, IMAGE, LONG), (IMAGE, IMAGE)])
def test_video_tokens_take_the_places_of_their_pads(media):
    """Catches spans filled with another span's tokens, pooling across spans, and times of the wrong span."""
    backend, prompt = FakeBackend(), a_prompt(*media)
    tokens = video_tokens(prompt)
    table = backend.table.copy()
    context = generate.read(backend, prompt, tokens)
    expected, pooled, rest = backend.table[prompt.ids], [], list(tokens)
    for span in prompt.spans:
        for place in range(span.start, span.start + span.num_tokens):
            expected[place] = rest.pop(0)
        own = expected[span.start : span.start + span.num_tokens]
        pooled += [frame.mean(0) for frame in np.split(own, span.grid_thw[0])]
    np.testing.assert_array_equal(context.embeds, expected)
    np.testing.assert_array_equal(context.pooled, pooled or np.zeros((1, WIDTH)))
    np.testing.assert_array_equal(backend.table, table)  # a fill through a view would change the model
    at, after = positions.mrope_positions(prompt.ids, prompt.spans, tokens_per_second=2.0)
    np.testing.assert_array_equal(context.positions, at)
    assert context.next_position == after


def test_the_text_position_rule_is_the_configs():
    """Catches a rule that stays behind in the config: checkpoints tuned under the newer one would be asked wrongly."""
    largest = a_context(FakeBackend(), LONG)
    spatial = a_context(FakeBackend(fake_model(overrides={"text_position_after_video": "spatial"})), LONG)
    assert largest.next_position - spatial.next_position == 16  # of 17 times, spatial counts one row


@pytest.mark.parametrize("chunk", [1, 7, 63, 10_000])
@pytest.mark.parametrize("text", [1, 63, 123])
def test_prefill_in_chunks_equals_one_pass(chunk, text):
    """Catches rows lost or repeated at chunk bounds, and a chunk that meets another chunk's rotary rows."""
    backend = FakeBackend()
    backend.prefill_chunk = chunk
    context = a_context(backend, VIDEO, text=text)
    writer = Writer(backend, context, 0)
    np.testing.assert_array_equal(writer.last_hidden, ByHand.of(context).hidden())
    assert max(backend.decoded) <= chunk
    assert sum(backend.decoded) == len(context.embeds)


@given(st.integers(1, 12), st.integers(0, 12), st.sets(st.integers(0, 383), max_size=300), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_answers_equal_those_without_a_cache(max_tokens, min_tokens, eos, seed):
    """Catches an end token that is taken too early, written out, or passed over, and a token that is never fed."""
    backend = FakeBackend()
    context = a_context(backend, VIDEO, seed=seed)
    writer = Writer(backend, context, max_tokens)
    found = list(writer.answer(max_tokens=max_tokens, min_tokens=min_tokens, eos=tuple(eos)))
    assert found == ByHand.of(context).answer(max_tokens, min_tokens, eos)
    assert backend.full_reads == [1] * min(len(found) + 1, max_tokens)  # lm_head once per token, one row of it


def test_the_first_end_token_ends_the_answer():
    """Catches end tokens other than the first of the list being ignored (Qwen has two)."""
    free = list(Writer(FakeBackend(), a_context(FakeBackend()), 9).answer(max_tokens=9, min_tokens=0, eos=NO_EOS))
    for end in free[1:]:
        writer = Writer(FakeBackend(), a_context(FakeBackend()), 9)
        assert list(writer.answer(max_tokens=9, min_tokens=0, eos=(383, end))) == free[: free.index(end)]


def test_logits_that_are_no_numbers_are_no_answer(monkeypatch):
    """Catches the first word of the vocabulary, over and over, as the answer of a model that overflowed."""
    backend = FakeBackend()
    writer = Writer(backend, a_context(backend), 4)
    monkeypatch.setattr(backend, "logits", lambda hidden: np.full((1, 384), np.nan, np.float32))
    with pytest.raises(BundleError, match="computes NaN"):
        next(writer.answer(max_tokens=4, min_tokens=0, eos=(2,)))
    monkeypatch.setattr(backend, "row_logits", lambda hidden, ids: np.full(len(ids), np.nan, np.float32))
    with pytest.raises(BundleError, match="computes NaN"):
        writer.score([(10, 2), (11, 2)])


@pytest.mark.parametrize("min_tokens", range(6))
def test_an_end_token_counts_from_min_tokens_on(min_tokens):
    """Catches a minimum that is off by one: an answer of exactly min_tokens is long enough."""
    context = a_context(FakeBackend(), VIDEO)
    for end in ByHand.of(context).answer(6):
        writer = Writer(FakeBackend(), context, 9)
        found = list(writer.answer(max_tokens=9, min_tokens=min_tokens, eos=(end,)))
        assert found == ByHand.of(context).answer(9, min_tokens, (end,))


@pytest.mark.parametrize("taken", [0, 1, 3, 6])
def test_an_answer_that_is_left_early_can_be_scored(taken):
    """Catches the last token taken, which was chosen but not fed yet, being lost, or fed twice."""
    backend = FakeBackend()
    context = a_context(backend, VIDEO)
    writer = Writer(backend, context, 20)
    written = list(islice(writer.answer(max_tokens=6, min_tokens=0, eos=NO_EOS), taken))
    assert len(written) == taken
    lead, answers = (7, 8), [(10, 2), (11, 2), (10, 3)]
    scores = writer.score(answers, lead)
    fresh = Writer(FakeBackend(), context, 20)
    assert scores == fresh.score(answers, (*written, *lead))
    np.testing.assert_array_equal(writer.last_hidden, ByHand.of(context).feed(*written, *lead).hidden())


def test_an_answer_that_ended_leaves_nothing_to_feed():
    """Catches the end token being fed as if it were part of the answer, and the last word being forgotten."""
    context = a_context(FakeBackend())
    free = ByHand.of(context).answer(8)
    writer = Writer(FakeBackend(), context, 20)
    end = next(token for token in free if token != free[0])
    written = list(writer.answer(max_tokens=8, min_tokens=0, eos=(end,)))
    assert written == free[: free.index(end)]
    writer.score([(3,), (4,)])
    np.testing.assert_array_equal(writer.last_hidden, ByHand.of(context).feed(*written).hidden())


def test_an_answer_goes_on_where_scoring_left_off():
    """Catches steps of the scoring that stay in the sequence."""
    backend = FakeBackend()
    context = a_context(backend, VIDEO)
    writer = Writer(backend, context, 30)
    writer.score([(10, 11, 2), (10, 12, 2), (20, 2)])
    assert list(writer.answer(max_tokens=5, min_tokens=0, eos=NO_EOS)) == ByHand.of(context).answer(5)


@given(st.lists(st.integers(-4, 5).filter(bool), max_size=12))
@settings(max_examples=60, deadline=None)
def test_steps_and_rewinds_leave_the_sequence_they_spell(moves):
    """Catches a rewind that moves the cache but not the position, or the other way round."""
    backend = FakeBackend()
    context = a_context(backend, VIDEO)
    writer = Writer(backend, context, 60)
    ids: list[int] = []
    for i, move in enumerate(moves):
        if move > 0:
            new = [10 * i + j for j in range(move)]
            hidden = writer.feed(backend.embed(np.array(new)))
            ids += new
            np.testing.assert_array_equal(hidden[-1:], ByHand.of(context).feed(*ids).hidden())
        elif ids:
            count = min(-move, len(ids))
            writer.rewind(count)
            del ids[-count:]
    np.testing.assert_array_equal(writer.feed_tokens([5]), ByHand.of(context).feed(*ids, 5).hidden())


def test_sequences_beyond_the_models_positions_are_refused():
    """Catches positions that the model never saw, and a limit off by one."""
    backend = FakeBackend(fake_model(overrides={"decoder.max_positions": 20}))
    context = a_context(backend, text=15)
    Writer(backend, context, 5)
    backend.decoded.clear()
    with pytest.raises(ConfigError, match=r"15 \+ 6 positions; this model has 20"):
        Writer(backend, context, 6)
    assert not backend.decoded, "refused before the model is run"


def test_a_writer_that_runs_out_of_room_says_so():
    """Catches a write beyond the cache."""
    backend = FakeBackend()
    writer = Writer(backend, a_context(backend), 2)
    with pytest.raises(ConfigError, match="8 slots of a cache of 7"):
        writer.feed(backend.embed(np.arange(3)))


def test_two_sequences_of_one_backend_do_not_mix():
    """Catches state of a sequence that is kept in the backend: threads would answer each other's questions."""
    backend = FakeBackend()
    contexts = [a_context(backend, VIDEO, seed=seed) for seed in (1, 2)]
    answers = [Writer(backend, context, 6).answer(max_tokens=6, min_tokens=0, eos=NO_EOS) for context in contexts]
    together = list(zip(*answers, strict=True))
    for context, found in zip(contexts, zip(*together, strict=True), strict=True):
        assert list(found) == ByHand.of(context).answer(6)


def test_the_fake_feels_every_token_and_position():
    """Catches a fake so forgetful that the tests above pass whatever is fed."""
    context = a_context(FakeBackend(), VIDEO)
    exact = ByHand.of(context).feed(5).hidden()
    for i in range(len(context.embeds)):
        other = ByHand.of(context)
        other.embeds = other.embeds.copy()
        other.embeds[i] += 1
        assert not np.array_equal(other.feed(5).hidden(), exact)
    moved = ByHand.of(context)
    moved.next_position += 1
    states = [exact, moved.feed(5).hidden(), ByHand.of(context).feed(5, 5).hidden()]
    assert all(not np.array_equal(a, b) for a, b in pairwise(states))
