"""Scores of choices against brute force: every choice fed whole, softmax over what may follow, no tree, no cache."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.closeness import assert_close
from tests.fakes import FakeBackend
from vlrt import choices, generate, positions
from vlrt.errors import ConfigError
from vlrt.generate import Writer
from vlrt.prompt import Prompt
from vlrt.runtime import Runtime
from vlrt.tokenizer import Tokenizer

END = 2


def a_context(backend, length=7):
    ids = np.random.default_rng(length).integers(100, 300, length)
    return generate.read(backend, Prompt(ids, (), ""), np.zeros((0, 16), np.float32))


def states_of(context, ids):
    """Hidden states of every position of the context and `ids`, in one pass."""
    backend = FakeBackend()
    embeds = np.concatenate([context.embeds, backend.embed(np.array(ids, np.int64))])
    after = np.stack([context.next_position + np.arange(len(ids))] * 3)
    where = np.concatenate([context.positions, after], axis=1)
    tables = positions.mrope_cos_sin(where, backend.model.decoder)
    return backend.decode(backend.prepare(len(embeds)), embeds, *tables)


def by_brute_force(context, answers):
    """Log p of each: at every token, softmax over the whole vocabulary with all but the allowed ones at -inf."""
    scores = []
    for answer in answers:
        logits = FakeBackend().logits(states_of(context, answer))[len(context.embeds) - 1 :].astype(np.float64)
        score = 0.0
        for depth, token_id in enumerate(answer):
            allowed = {other[depth] for other in answers if other[:depth] == answer[:depth]}
            masked = np.full(logits.shape[1], -np.inf)
            masked[list(allowed)] = logits[depth, list(allowed)]
            score += masked[token_id] - np.logaddexp.reduce(masked)
        scores.append(score)
    return scores


def score(answers, context=None):
    backend = FakeBackend()
    context = context or a_context(backend)
    writer = Writer(backend, context, 20)
    return writer.score(answers), backend, writer, context


words = st.lists(st.integers(10, 13), min_size=0, max_size=5).map(lambda ids: (*ids, END))


@given(st.lists(words, min_size=1, max_size=7, unique=True), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
@example([(10, END), (11, END), (12, END), (13, END)], 5)  # A B C D
@example([(10, END), (10, 11, END), (10, 11, 11, END)], 5)  # "1", "10", "100": each begins the next
@example([(10, 11, 12, 13, END), (10, 11, 12, 12, END)], 5)  # alike up to the last word
@example([(10, 11, END)], 5)
def test_scores_equal_brute_force(answers, length):
    """Catches a fork scored on the wrong state, a prefix that swallows a longer choice, and a missed rewind."""
    context = a_context(FakeBackend(), length)
    found, _, writer, _ = score(answers, context)
    assert_close(found, by_brute_force(context, answers))
    assert_close(np.exp(found).sum(), 1.0)
    # and the sequence is as it was
    assert writer._cache.length == length
    np.testing.assert_array_equal(writer.feed_tokens([5]), states_of(context, [5])[-1:])


def test_only_rows_at_forks_are_read():
    """Catches lm_head being run over the vocabulary, rows of tokens that no choice has, and needless decoder steps."""
    answers = [(10, 11, 12, END), (10, 11, 13, END), (20, 21, 22, END)]
    _, backend, _, _ = score(answers)
    assert backend.full_reads == []
    assert backend.row_reads == [(10, 20), (12, 13)]
    assert backend.decoded[1:] == [2]  # 10 and 11 in one pass; nothing after the last fork is fed


@pytest.mark.parametrize(
    ("answers", "passes"),
    [
        ([(10, 11, 11, END), (10, 11, 12, END), (10, 12, END), (13, END)], [2]),  # forks after 10 and after 10 11
        ([(10, END), (10, 11, END), (10, 11, 11, END), (10, 11, 11, 11, END)], [3]),
        ([(10, 11, END), (10, 12, END), (20, 21, END), (20, 22, END)], [1, 1]),  # neither may see the other
        ([(10, 11, 12, END), (20, 21, 22, END)], []),
    ],
)
def test_a_branch_of_choices_takes_one_pass(answers, passes):
    """Catches a decoder pass per fork: on a CPU a pass over one token takes as long as one over eight."""
    found, backend, _, context = score(answers)
    assert backend.decoded[1:] == passes
    assert_close(found, by_brute_force(context, answers))


def test_long_choices_that_begin_alike_are_scored():
    """Catches a call per shared token: a RecursionError beyond a thousand of them, and a decoder pass for each."""
    stem = [10 + i % 90 for i in range(1500)]
    backend = FakeBackend()
    found = Writer(backend, a_context(backend), len(stem) + 2).score([(*stem, 11, END), (*stem, 12, END)])
    assert_close(np.exp(found).sum(), 1.0)
    assert backend.decoded[1:] == [1500]


def test_choices_that_each_begin_the_next_are_scored():
    """Catches a call per fork: a RecursionError beyond a thousand of them."""
    backend = FakeBackend()
    answers = [(*[10] * count, END) for count in range(1200)]
    found = Writer(backend, a_context(backend), 1200).score(answers)
    assert_close(np.exp(found).sum(), 1.0)


def test_single_tokens_cost_no_step():
    """Catches a decoder step per choice where one state tells them all apart (A, B, C, D)."""
    found, backend, _, context = score([(10, END), (11, END), (12, END)])
    assert backend.decoded == [len(context.embeds)]
    logits = FakeBackend().logits(states_of(context, [])[-1:])[0, [10, 11, 12]].astype(np.float64)
    assert_close(found, logits - np.logaddexp.reduce(logits))


def test_one_choice_is_certain():
    """Catches a probability below 1, and work, where there is nothing to choose."""
    found, backend, _, _ = score([(10, 11, END)])
    assert found == [0.0]
    assert backend.row_reads == []


@pytest.mark.parametrize(
    "given",
    [
        ["yes"],
        "yes",
        ["yes", "yes"],
        ["yes", ""],
        ["yes", 1],
        ["yes", ["no"]],
        5,
        ["caf\u00e9", "cafe\u0301"],  # equal tokens
    ],
)
def test_choices_that_cannot_be_told_apart_are_refused(given, tiny_path):
    """Catches an IndexError deep in the tree of tokens, where no fork ever parts two choices."""
    runtime = Runtime(FakeBackend(), Tokenizer.open(tiny_path))
    with pytest.raises(ConfigError, match=r"choices are .* accepted: "):
        runtime.ask(None, "which?", choices=given, reasoning="direct")


def test_a_choice_that_no_tokenizer_takes_is_refused(tiny_path):
    """Catches a TypeError of the tokenizer: on a command line any bytes may stand."""
    runtime = Runtime(FakeBackend(), Tokenizer.open(tiny_path))
    with pytest.raises(ConfigError, match="the choice is not valid Unicode"):
        runtime.ask(None, "which?", choices=["yes", "\ud800"], reasoning="direct")


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
def test_large_logits_do_not_overflow(offset):
    """Catches a softmax without the maximum taken out: exp(1e4) is inf, and every score nan."""

    def rows(hidden, ids):
        return np.array([1.0, 3.0, 200.0], np.float32)[: len(ids)] + np.float32(offset)

    found = choices.log_probabilities([(10,), (11,), (12,)], None, None, rows)
    assert_close(found, [-199.0, -197.0, 0.0])
