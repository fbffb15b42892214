"""The runtime's choices: their scores, how sure an answer is, latents that end early, and what stands before a choice.

test_choices.py holds the scores against brute force.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.bundles import QUESTION, QUICK, square
from vlrt.answer import Clock
from vlrt.backends.ort import OrtBackend
from vlrt.errors import ConfigError
from vlrt.generate import Writer
from vlrt.memory import Memory
from vlrt.request import ANSWER_TAG, Request
from vlrt.runtime import Runtime


@pytest.fixture(scope="module")
def opened(make_bundle):
    with Runtime.open(make_bundle(overrides=QUICK), video_cache_bytes=0) as opened:
        yield opened


@pytest.mark.parametrize("reasoning", ["latent", "direct", "cot"])
@pytest.mark.parametrize("choices", [["A", "B", "C"], ["to the left", "to the right", "to the", "nowhere", "ü"]])
def test_choices_are_scored(opened, reasoning, choices):
    """Catches scores that are no distribution, and a choice that is not the likeliest or not the text."""
    out = opened.ask(square(), QUESTION, choices=choices, reasoning=reasoning, max_tokens=6)
    assert list(out.scores) == choices
    assert sum(out.scores.values()) == pytest.approx(1)
    assert out.choice == out.text == max(out.scores, key=out.scores.get)
    assert list(out.token_ids) == opened.tokenizer.encode(out.choice)
    assert (out.thought is not None) == (reasoning == "cot")
    shuffled = opened.ask(square(), QUESTION, choices=choices[::-1], reasoning=reasoning, max_tokens=6)
    assert shuffled.scores == pytest.approx(out.scores, rel=1e-4)


def test_scores_are_the_odds_of_the_model_s_next_words(opened, monkeypatch):
    """Catches scores of other positions or rows: single tokens must have the odds that the whole output head gives."""
    seen = []
    logits = OrtBackend.logits
    monkeypatch.setattr(
        OrtBackend, "logits", lambda self, hidden: seen.append(logits(self, hidden)[0]) or seen[-1][None]
    )
    opened.ask(square(), QUESTION, max_tokens=1)
    choices = ["A", "b", "7"]
    ids = [opened.tokenizer.encode(choice)[0] for choice in choices]
    odds = np.exp(seen[0][ids].astype(np.float64))
    out = opened.ask(square(), QUESTION, choices=choices)
    assert out.scores == pytest.approx(dict(zip(choices, odds / odds.sum(), strict=True)), rel=1e-4)


@pytest.mark.parametrize("reasoning", ["latent", "direct", "cot"])
def test_branches_of_choices_take_one_pass_and_do_not_see_each_other(opened, monkeypatch, reasoning):
    """Catches a decoder pass per branch, branches that look at each other, and slots that stay taken."""
    choices = ["to the left", "to the right", "nowhere", "nobody", "up, up, up", "up, up, down"]
    asked = {"choices": choices, "reasoning": reasoning, "max_tokens": 3}
    passes, decode = [], OrtBackend.decode

    def spy(self, cache, embeds, cos, sin, lanes=None):
        passes.append(None if lanes is None else len(set(lanes.tolist())))
        return decode(self, cache, embeds, cos, sin, lanes)

    monkeypatch.setattr(OrtBackend, "decode", spy)
    out = opened.ask(square(), QUESTION, **asked)
    assert [count for count in passes if count is not None] == [3]
    assert passes[-1] == 3
    with opened.open_video(square()) as video:
        for _ in range(2):
            assert video.ask(QUESTION, **asked).scores == pytest.approx(out.scores, rel=1e-4)
    passes.clear()
    monkeypatch.setattr(Writer, "feed_apart", Writer._feed_in_turn)
    ref = opened.ask(square(), QUESTION, **asked)
    assert set(passes) == {None}
    assert out.scores == pytest.approx(ref.scores, rel=1e-4)


def test_a_temperature_makes_choices_less_certain_and_none_likelier(opened, monkeypatch):
    """Catches a bundle's temperature that is ignored, applied twice, or to the odds of each word."""
    choices = ["to the left", "to the right", "nowhere"]
    ref = opened.ask(square(), QUESTION, choices=choices)
    monkeypatch.setattr(opened, "model", replace(opened.model, choice_temperature=2.0))
    out = opened.ask(square(), QUESTION, choices=choices)
    odds = np.sqrt(list(ref.scores.values()))
    assert out.scores == pytest.approx(dict(zip(choices, odds / odds.sum(), strict=True)), rel=1e-5)
    assert out.choice == ref.choice
    for one in (ref, out):
        assert one.confidence == one.scores[one.choice]
    assert out.confidence < ref.confidence


@pytest.mark.parametrize("least", [0, 5])
def test_confidence_in_free_text_is_the_mean_probability_of_its_tokens(opened, monkeypatch, least):
    """Catches a mean without the token that ended it, over barred tokens, or of another step's logits."""
    seen = []
    logits = OrtBackend.logits
    monkeypatch.setattr(
        OrtBackend, "logits", lambda self, hidden: seen.append(logits(self, hidden)[0]) or seen[-1][None]
    )
    free = opened.ask(square(), QUESTION, reasoning="direct", max_tokens=9)
    eos = free.token_ids[2]
    tokens = replace(opened.model.tokens, eos_token_ids=(eos,))
    monkeypatch.setattr(opened, "model", replace(opened.model, tokens=tokens))
    seen.clear()
    out = opened.ask(square(), QUESTION, reasoning="direct", max_tokens=9, min_tokens=least)
    chosen = [*out.token_ids, *([eos] if out.finished else [])]
    assert len(chosen) == len(seen) > least
    expected = []
    for step, (row, token_id) in enumerate(zip(seen, chosen, strict=True)):
        wide = row.astype(np.float64)
        if step < least:
            wide[eos] = -np.inf
        expected.append(np.exp(wide[token_id]) / np.exp(wide).sum())
    assert out.confidence == pytest.approx(np.prod(expected) ** (1 / len(expected)), rel=1e-5)
    assert opened.ask(square(), QUESTION, reasoning="cot", max_tokens=3).confidence is None


def test_an_early_exit_equals_asking_with_those_latents(opened):
    """Catches scores of a state with other latents, and a choice asked about at another temperature."""
    asked = {"question": QUESTION, "choices": ["to the left", "to the right", "nowhere"]}
    whole = opened.ask(square(), **asked)
    early = [opened.ask(square(), early_exit=limit, **asked) for limit in (1e-6, whole.confidence * 0.999, 1.0)]
    assert [answer.usage.latents for answer in early][::2] == [1, 4]
    for answer in early:
        ref = opened.ask(square(), latents=answer.latents, **asked)
        assert answer.scores == pytest.approx(ref.scores, rel=1e-3)
        np.testing.assert_allclose(answer.latents, whole.latents[: len(answer.latents)], rtol=1e-3, atol=1e-5)
    assert early[2].scores == pytest.approx(whole.scores, rel=1e-3)
    with opened.open_video(square()) as video:
        for answer, limit in zip(early, (1e-6, whole.confidence * 0.999, 1.0), strict=True):
            out = video.ask(early_exit=limit, **asked)
            assert (out.usage.latents, out.choice) == (answer.usage.latents, answer.choice)
        assert video.ask(**asked).scores == pytest.approx(whole.scores, rel=1e-3)


@pytest.mark.parametrize(
    "given",
    [
        {"early_exit": 0, "choices": ["a", "b"]},
        {"early_exit": 1.1, "choices": ["a", "b"]},
        {"early_exit": True, "choices": ["a", "b"]},
        {"early_exit": 0.9},
        {"early_exit": 0.9, "choices": ["a", "b"], "reasoning": "direct"},
        {"early_exit": 0.9, "choices": ["a", "b"], "latents": "dummy"},
    ],
)
def test_an_early_exit_that_cannot_be_is_refused(opened, given):
    with pytest.raises(ConfigError, match=r"early_exit is .*; accepted: "):
        opened.ask(square(), QUESTION, **given)


def test_the_output_head_runs_only_where_a_token_is_needed(opened, monkeypatch):
    """Catches latents, prefill or choices that pay for the whole vocabulary."""
    sizes = []
    logits = OrtBackend.logits
    monkeypatch.setattr(OrtBackend, "logits", lambda self, hidden: sizes.append(len(hidden)) or logits(self, hidden))
    opened.ask(square(), QUESTION, choices=["left", "right"])
    assert sizes == []
    opened.ask(square(), QUESTION, max_tokens=3, min_tokens=3)
    assert sizes == [1, 1, 1]


def test_choices_after_a_chain_follow_the_answer_s_tag(opened, monkeypatch):
    """Catches a tag that is written twice, or left out where the model did not write it."""
    fed = []
    embed = OrtBackend.embed
    monkeypatch.setattr(OrtBackend, "embed", lambda self, ids: fed.extend(ids.tolist()) or embed(self, ids))
    tag = opened.tokenizer.encode(ANSWER_TAG)
    out = opened.ask(square(), QUESTION, choices=["left", "right"], reasoning="cot", max_tokens=5, min_tokens=5)
    assert fed[-len(tag) :] == tag
    assert out.usage.answer_tokens == 5
    wanted = [*opened.tokenizer.encode("so"), *tag, *opened.tokenizer.encode("never read")]

    def says(self, hidden, said=iter(wanted)):  # noqa: B008  # one iterator for all calls
        return np.eye(1, self.model.decoder.vocab_size, next(said), dtype=np.float32)

    monkeypatch.setattr(OrtBackend, "logits", says)
    fed.clear()
    out = opened.ask(square(), QUESTION, choices=["left", "right"], reasoning="cot", max_tokens=50)
    assert fed[-len(tag) - 2 :] == wanted[: len(tag) + 2]
    assert (out.thought, out.usage.answer_tokens) == ("so", len(tag) + 2)


def test_a_choice_after_a_chain_ends_in_the_closing_tag(opened, monkeypatch):
    """Catches "1" held against "10" by the token that ends a turn, which never stands inside the answer's tags."""
    read = []
    row_logits = OrtBackend.row_logits
    monkeypatch.setattr(
        OrtBackend, "row_logits", lambda self, hidden, ids: read.append(ids.tolist()) or row_logits(self, hidden, ids)
    )
    ends = {"cot": opened.tokenizer.encode("</answer>")[0], "direct": opened.model.tokens.eos_token_ids[0]}
    for reasoning, end in ends.items():
        read.clear()
        out = opened.ask(square(), QUESTION, choices=["1", "10"], reasoning=reasoning, max_tokens=2)
        assert read == [[end, opened.tokenizer.encode("0")[0]]]
        assert list(out.token_ids) == opened.tokenizer.encode(out.choice)
    tagged = opened.ask(square(), QUESTION, choices=["1", "1</answer>"], reasoning="cot", max_tokens=2)
    assert sum(tagged.scores.values()) == pytest.approx(1)


class Words:
    """A tokenizer whose tokens are whole words; ids are places in a list."""

    def __init__(self, words):
        self.words = words

    def encode(self, text):
        return [self.words.index(character) for character in text]

    def decoder(self):
        return SimpleNamespace(push=lambda i: self.words[i], finish=lambda: "")


@pytest.mark.parametrize(
    ("said", "kept", "lead"),
    [
        (["think ", "<answer", ">B"], 2, ">"),  # a token that runs on beyond the tag is taken back
        (["think ", "<answer>"], 2, ""),
        (["think <answer>B"], 0, "<answer>"),
        (["think "], 1, "<answer>"),  # ended without the tag
    ],
)
def test_choices_are_scored_right_behind_the_tag(opened, said, kept, lead):
    """Catches a tag that is written twice, or choices that are scored behind the first letter of an answer."""
    tokenizer = Words([*said, *"<answer>"])
    memory = Memory(opened._backend, opened.model, tokenizer, None, None)
    taken_back = []
    writer = SimpleNamespace(answer=lambda **_: iter(range(len(said))), take_back=lambda: taken_back.append(True))
    request = Request("?", "cot", ("A", "B"), (), 9, 0, None)
    written = []
    pieces = memory._write(writer, request, [], written, Clock())
    missing = []

    def drain():
        missing.extend((yield from pieces))

    list(drain())
    assert missing == tokenizer.encode(lead)
    assert len(written) == kept
    assert bool(taken_back) == (kept < len(said))
