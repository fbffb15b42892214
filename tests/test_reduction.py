"""Tokens of a video that a model is not shown: which ones, and that the others are read as if nothing was missing.

What it costs in accuracy is measured by benches/bench_reduction.py, not here.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
import torch

from tests.bundles import QUESTION, QUICK, Oracle, plain_vision, torch_runtime
from tests.videos import VISION
from vlrt import reduction
from vlrt.errors import ConfigError, VlrtError
from vlrt.reduction import Reduction, changed, related
from vlrt.runtime import Runtime
from vlrt.video import Frames

MODELS = {
    "qwen2_5_vl": {"overrides": {**QUICK, "decoder.max_positions": 2048}},
    "qwen2_vl": {"family": "qwen2_vl", "overrides": plain_vision(**{"decoder.max_positions": 2048})},
}
FORCED = {"max_tokens": 12, "min_tokens": 12}
SEEN = ("text", "token_ids", "choice")


def still(count=16, moves=()):
    """Noise that stands still, 84 x 112, temporal patches of two frames; in those of `moves` one square is new."""
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.integers(0, 256, (1, 84, 112, 3), np.uint8), count, axis=0)
    for step in moves:
        frames[2 * step :, 28:56, 56:84] = rng.integers(0, 256, (28, 28, 3), np.uint8)
    return Frames.from_array(frames, fps=2)


def noise(count=16):
    return Frames.from_array(np.random.default_rng(1).integers(0, 256, (count, 84, 112, 3), np.uint8), fps=2)


@pytest.fixture(scope="module", params=MODELS)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def opened(family, make_bundle, make_checkpoint):
    """One family's bundle in ONNX Runtime, the other's checkpoint in PyTorch: exports take long."""
    if family == "qwen2_vl":
        opened = torch_runtime(make_checkpoint(**MODELS[family]))
    else:
        opened = Runtime.open(make_bundle(**MODELS[family]), threads=1)
    with opened:
        yield opened


@pytest.fixture
def passes(opened, monkeypatch):
    """Temporal patches of every pass of the vision tower."""
    seen, encode = [], opened._backend.encode

    def spy(pixels, grid_thw, **kw):
        seen.append(grid_thw[0])
        return encode(pixels, grid_thw, **kw)

    monkeypatch.setattr(opened._backend, "encode", spy)
    return seen


# Which tokens


def test_changed_tokens_are_those_of_a_loop():
    """Catches pixels counted to another token, a second frame that is not looked at, and uint8 that wraps around."""
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, (8, 56, 84, 3), np.uint8)
    data[3, :28, :28] = data[2, :28, :28]
    data[4:6] = data[2:4]
    data[5, 28:, 56:, 1] ^= 255
    frames = Frames.from_array(data, fps=1)
    kept = changed(frames, VISION, 60.0)
    shown = {}
    for step in range(4):
        for token in range(6):
            row, column = divmod(token, 3)
            square = data[2 * step : 2 * step + 2, 28 * row :, 28 * column :][:, :28, :28].astype(float)
            new = token not in shown or np.abs(square - shown[token]).mean() > 60
            assert kept[step, token] == new
            if new:
                shown[token] = square
    assert 6 < kept.sum() < kept.size


def test_what_changes_slowly_is_kept_in_the_end():
    """Catches tokens held against the one before, dropped or not: a fade of one level a step would never be seen."""
    data = np.repeat(np.arange(20, dtype=np.uint8), 2)[:, None, None, None] * np.ones((1, 28, 28, 3), np.uint8)
    kept = changed(Frames.from_array(data, fps=1), VISION, 4.0)
    assert np.flatnonzero(kept[:, 0]).tolist() == [0, 5, 10, 15]


def test_nothing_else_than_a_copy_is_dropped_at_0():
    assert changed(noise(), VISION, 0.0).all()
    assert changed(still(moves=[3]), VISION, 0.0).sum() == 12 + 1


def test_what_a_question_keeps_is_the_greedy_subset_of_largest_determinant():
    """Catches an update of the gains that is not that of the determinant, and a relevance that does not count."""
    rng = np.random.default_rng(0)
    tokens, question = rng.standard_normal((9, 6)).astype(np.float32), rng.standard_normal((3, 6)).astype(np.float32)
    unit, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (tokens.astype(float), question.astype(float)))
    relevance = (unit @ asked.T).mean(1)
    relevance = (relevance - relevance.min()) / np.ptp(relevance)
    kernel = relevance[:, None] * (unit @ unit.T) * relevance
    picked = []
    for count in range(1, 6):
        rest = [i for i in range(9) if i not in picked]
        picked.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*picked, i], [*picked, i])])))
        assert sorted(picked) == np.flatnonzero(related(tokens, question, count / 9)).tolist()
    best = max(combinations(range(9), 2), key=lambda two: np.linalg.det(kernel[np.ix_(two, two)]))
    assert sorted(picked[:2]) == sorted(best)  # of this seed: greedy need not find the largest
    turned = related(tokens, -question, 3 / 9)
    assert np.flatnonzero(turned).tolist() != sorted(picked[:3])


@pytest.mark.parametrize(("count", "keep", "kept"), [(1, 0.01, 1), (30, 0.1, 3), (1200, 0.5, 600), (777, 0.25, 195)])
def test_so_many_are_kept_as_was_asked(count, keep, kept):
    """Catches a stretch whose share is rounded on its own, and 30 tenths of a token that become four."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((count, 8)).astype(np.float32)
    tokens[count // 2 :] = tokens[0]  # copies: there is less to tell apart than is to be kept
    mask = related(tokens, rng.standard_normal((2, 8)).astype(np.float32), keep)
    assert mask.sum() == kept == Reduction(keep=keep).num_kept(count)
    whole = 512 if count > 512 else count
    assert mask[:whole].sum() >= int(whole * keep)  # each stretch keeps its share


def test_copies_go_first():
    """Catches pruning by relevance alone, which keeps the same thing many times."""
    rng = np.random.default_rng(0)
    tokens = np.repeat(rng.standard_normal((4, 16)).astype(np.float32), 5, axis=0)
    kept = np.flatnonzero(related(tokens, tokens[:1], 4 / 20))
    assert sorted(kept // 5) != [0, 0, 0, 0]
    assert len(set(kept // 5)) >= 3  # one has relevance 0 and is never sought


def test_equal_tokens_have_a_first_one():
    """Catches NaN where all tokens are equally related: 0 / 0."""
    assert related(np.ones((8, 4), np.float32), np.ones((1, 4), np.float32), 0.25).sum() == 2


@pytest.mark.parametrize(
    "given", [{"unchanged": -1}, {"unchanged": 256}, {"unchanged": True}, {"keep": 0}, {"keep": 1.1}, {"keep": None}]
)
def test_numbers_out_of_range_are_refused(given):
    with pytest.raises(ConfigError, match=r"reduction\.(unchanged|keep) is .*; accepted: "):
        Reduction(**given)


def test_what_is_no_reduction_is_refused(opened):
    with pytest.raises(ConfigError, match=r"reduce is 0\.5; accepted: a vlrt\.Reduction"):
        opened.ask(still(), QUESTION, reduce=0.5)


# What is read


def greedy_without(oracle, kept, count):
    """What transformers says where the video's dropped tokens are taken out of its embeddings and positions."""
    caught, text = {}, oracle.model.model.language_model
    hook = text.register_forward_pre_hook(lambda _, args, kwargs: caught.update(kwargs), with_kwargs=True)
    at = torch.from_numpy(oracle.positions(oracle.ids.shape[1]))[:, None]
    with torch.inference_mode():
        oracle.model(input_ids=oracle.ids, position_ids=at, **oracle.inputs)
    hook.remove()
    stays = np.ones(oracle.ids.shape[1], bool)
    stays[oracle.inputs["mm_token_type_ids"][0].numpy() == 2] = kept
    found = []
    embeds, where = caught["inputs_embeds"][:, stays], at[..., stays]
    for _ in range(count):
        with torch.inference_mode():
            logits = oracle.model.lm_head(text(inputs_embeds=embeds, position_ids=where)[0])[0, -1]
            logits[list(oracle.eos)] = -torch.inf
        found.append(int(logits.argmax()))
        embeds = torch.cat([embeds, oracle.model.get_input_embeddings()(torch.tensor([found[-1:]]))], 1)
        where = torch.cat([where, where.max().reshape(1, 1, 1).expand(3, 1, 1) + 1], 2)
    return found


def test_answers_equal_transformers_without_those_tokens(make_checkpoint, opened, family):
    """Catches a token that moves up into the place of a dropped one, and another that is left out."""
    clip = still(moves=[2, 5])
    ref = Oracle(make_checkpoint(**MODELS[family]), clip, QUESTION)
    for reduce in (Reduction(unchanged=1.0), Reduction(keep=0.3), Reduction(unchanged=1.0, keep=0.5)):
        opened._recent.clear()
        out = opened.ask(clip, QUESTION, reduce=reduce, reasoning="direct", **FORCED)
        ((memory, _),) = opened._recent._kept.values()
        assert list(out.token_ids) == greedy_without(ref, memory._kept, 12)
        kept = reduce.num_kept(14 if reduce.unchanged else 96)
        assert (out.usage.video_tokens, out.usage.dropped_tokens) == (kept, 96 - kept)
        assert out.usage.prompt_tokens == ref.ids.shape[1] - 96 + kept


def test_where_nothing_is_dropped_nothing_changes(opened):
    """Catches a reduction that costs something where it finds nothing."""
    ref = opened.ask(noise(), QUESTION, **FORCED)
    out = opened.ask(noise(), QUESTION, reduce=Reduction(unchanged=0), **FORCED)
    assert (out.token_ids, out.usage.dropped_tokens) == (ref.token_ids, 0)
    np.testing.assert_array_equal(out.latents, ref.latents)


def test_temporal_patches_without_a_new_token_do_not_enter_the_tower(opened, passes):
    """Catches a tower that reads what is dropped anyhow, and tokens of another temporal patch."""
    clip = still(moves=[2, 5])
    seen = {}
    for reduce in (None, Reduction(unchanged=0)):
        with opened.open_video(clip, reduce=reduce) as video:
            seen[reduce] = video._memory
    assert passes == [8, 3]
    whole, thinned = seen.values()
    kept = np.asarray(whole._tokens)[thinned.shown.kept]
    np.testing.assert_allclose(np.asarray(thinned._tokens), kept, rtol=1e-4, atol=1e-5)
    # Equal frames have equal tokens: what the latents look at is as if nothing had been dropped.
    np.testing.assert_allclose(np.asarray(thinned._pooled), np.asarray(whole._pooled), rtol=1e-4, atol=1e-5)


QUESTIONS = (
    {"question": QUESTION, **FORCED},
    {"question": "How many?", "reasoning": "direct", **FORCED},
    {"question": "Left or right?", "choices": ["left", "right"]},
)


@pytest.mark.parametrize("reduce", [Reduction(unchanged=1), Reduction(keep=0.5), Reduction(unchanged=1, keep=0.4)])
def test_questions_about_one_video_equal_fresh_ones(opened, passes, reduce):
    """Catches a prefix that is reused for a question that keeps other tokens, and a rewind that counts dropped ones."""
    clip = still(moves=[1, 2, 5])
    fresh = []
    for asked in QUESTIONS:
        opened._recent.clear()
        fresh.append(opened.ask(clip, reduce=reduce, **asked))
    opened._recent.clear()
    passes.clear()
    many = opened.ask_many([{"video": clip, "reduce": reduce, **asked} for asked in QUESTIONS])
    with opened.open_video(clip, reduce=reduce) as video:
        for i in (0, 1, 2, 2, 0, 0, 1):
            out = video.ask(**QUESTIONS[i])
            for one in (out, many[i]):
                assert [getattr(one, name) for name in SEEN] == [getattr(fresh[i], name) for name in SEEN]
                assert one.usage.video_tokens == fresh[i].usage.video_tokens
            if reduce.keep == 1:
                assert out.usage.reused_tokens > out.usage.video_tokens
        assert video.ask(**QUESTIONS[i]).usage.reused_tokens > 0  # the same question twice
    assert len(passes) == 2  # one for all of ask_many, one for the open video


def test_questions_side_by_side_know_what_was_dropped(opened):
    """Catches a lane behind a prefix of another length, and an early exit that ends the latents of another question."""
    clip, reduce = still(moves=[1, 2, 5]), Reduction(unchanged=1)
    asked = [*QUESTIONS, {"question": "Up or down?", "choices": ["up", "down"], "early_exit": 0.01}]
    opened._recent.clear()
    fresh = [opened.ask(clip, reduce=reduce, **one) for one in asked]
    assert [answer.usage.latents for answer in fresh] == [4, 0, 4, 1]
    opened._recent.clear()
    with opened.open_video(clip, reduce=reduce) as video:
        for many in (
            opened.ask_many([{"video": clip, "reduce": reduce, **one} for one in asked]),
            video.ask_many(asked),
        ):
            for out, ref in zip(many, fresh, strict=True):
                assert [getattr(out, name) for name in SEEN] == [getattr(ref, name) for name in SEEN]
                assert (out.usage.latents, out.usage.dropped_tokens) == (ref.usage.latents, ref.usage.dropped_tokens)


def test_a_reduced_video_is_remembered_apart(opened):
    """Catches a key that does not name the reduction: tokens that are missing from another question's video."""
    clip = still(moves=[2])
    reductions = [None, Reduction(unchanged=0), Reduction(keep=0.5), Reduction(keep=0.25)]
    fresh = []
    for reduce in reductions:
        opened._recent.clear()
        fresh.append(opened.ask(clip, QUESTION, reduce=reduce, **FORCED))
    assert len({answer.usage.video_tokens for answer in fresh}) == 4
    opened._recent.clear()
    for turn in range(2):
        for reduce, ref in zip(reductions, fresh, strict=True):
            out = opened.ask(clip, QUESTION, reduce=reduce, **FORCED)
            assert (out.token_ids, out.usage.video_tokens) == (ref.token_ids, ref.usage.video_tokens)
            assert (out.usage.reused_tokens > 0) == (turn == 1)


def test_a_video_fits_when_enough_of_it_is_dropped(opened, monkeypatch):
    """Catches a length that counts what is not read, and one that forgets the rest."""
    ref = opened.ask(still(), QUESTION, reduce=Reduction(unchanged=0), **FORCED)
    model = replace(opened.model, decoder=replace(opened.model.decoder, max_positions=ref.usage.prompt_tokens + 40))
    monkeypatch.setattr(opened, "model", model)
    monkeypatch.setattr(opened._backend, "model", model)
    opened._recent.clear()
    with pytest.raises(VlrtError, match="positions"):
        opened.ask(still(), QUESTION, **FORCED)
    for reduce in (Reduction(unchanged=0), Reduction(keep=0.1)):
        assert opened.ask(still(), QUESTION, reduce=reduce, **FORCED).usage.dropped_tokens >= 84
    opened._recent.clear()


def test_images_are_kept_whole(opened):
    """Catches a first temporal patch held against nothing."""
    out = opened.ask(still(2), QUESTION, reduce=Reduction(unchanged=255), **FORCED)
    assert (out.usage.video_tokens, out.usage.dropped_tokens) == (12, 0)


def test_a_stream_takes_it_too(opened):
    stream = opened.stream(still(), QUESTION, reduce=Reduction(unchanged=0), **FORCED)
    list(stream)
    assert stream.answer.usage.dropped_tokens == 84
    assert Reduction() == reduction.NONE
