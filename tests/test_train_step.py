"""What is drawn for a step and what it computes then: fewer latents, other rollouts, ends of latents, bf16."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.closeness import assert_close
from tests.training import (
    QUICK,
    SMALL,
    metrics,
    one_thread,  # noqa: F401 - for every test here
    write_triplets,
)
from vlrt import config, prompt
from vlrt.errors import ConfigError
from vlrt.preprocess import Patches
from vlrt.train import data, learner, loop, objective, order, triplets
from vlrt.train.batch import collate, shorten
from vlrt.train.data import VideoQuestions
from vlrt.train.objective import IGNORED
from vlrt.train.settings import Objective
from vlrt.train.system import Draw, Trainee, check, draw

PARALLEL = {"num_latents": 3, "num_heads": 4, "rollout": "parallel", "rounds": 3}
ENDING = {"num_latents": 3, "num_heads": 4, "stop": "end_token"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triplets(tmp_path_factory.mktemp("triplets"))


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(**SMALL)


def encode(checkpoint, question, model=None, *, answer="no"):
    row = triplets.Triplet(1, 1, Path("a.mp4"), question, answer)
    patches = Patches(np.zeros((32, 1176), np.float32), (2, 4, 4), 1.0, False)
    tokenizer = prompt.Tokenizer.open(checkpoint.path)
    return data.encode(row, patches, tokenizer, model or checkpoint.model, "latent", tells_answer=True)


def a_batch(checkpoint, rows, folder):
    found = triplets.read(rows).rows
    questions = VideoQuestions(found, checkpoint.path, checkpoint.model, "latent", folder / "frames")
    return collate([questions[0], questions[1]])


def encoded(batch, tokens):
    """Return a batch whose videos come as what the tower made of them."""
    known = torch.ones(len(batch.ids), dtype=torch.bool)
    return replace(batch, tokens=torch.cat(tokens), encoded=known, pixels=batch.pixels[:0])


# --- drawn --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", ["fixed", "end_token"])
def test_a_shortened_batch_is_that_of_a_model_with_fewer_latents(checkpoint, stop):
    """Catches positions, labels or ranges that still count the slots that went, and padding that moved."""
    latent = replace(checkpoint.model.latent, stop=stop)
    model = replace(checkpoint.model, latent=latent)
    fewer = replace(model, latent=replace(latent, num_latents=1))
    asked = ("Which?", "Which of all these ways?")
    batch = collate([encode(checkpoint, question, model) for question in asked])
    ref = collate([encode(checkpoint, question, fewer) for question in asked])
    out = shorten(batch, 1)
    for field in fields(ref):
        value = getattr(ref, field.name)
        same = torch.equal(value, getattr(out, field.name)) if torch.is_tensor(value) else True
        assert same, field.name
    assert shorten(batch, 3) is batch


def test_latents_rounds_and_rollouts_are_drawn_from_their_ranges(checkpoint):
    """Catches a range that is never used up, more rounds than latents, and draws that shift other draws."""
    plan = config.Latent(**{**vars(checkpoint.model.latent), **PARALLEL, "num_latents": 4, "rounds": 3})
    chosen = replace(QUICK, min_latents=2, min_rounds=1, rollouts=("recurrent", "parallel"))
    found = [draw(chosen, plan, step) for step in range(300)]
    assert found == [draw(chosen, plan, step) for step in range(300)]
    assert {d.num_latents for d in found} == {2, 3, 4}
    assert {d.rounds for d in found} == {1, 2, 3}
    assert all(d.rounds <= d.num_latents for d in found)
    assert {d.rollout for d in found} == {"recurrent", "parallel"}
    fixed = [draw(replace(QUICK, min_rounds=1), plan, step) for step in range(300)]
    assert {(d.num_latents, d.rollout) for d in fixed} == {(4, "parallel")}
    assert [d.hides_video for d in fixed] == [d.hides_video for d in found]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"min_latents": 4}, "min_latents is 4; accepted: at most the model's 3"),
        ({"min_rounds": 2}, "min_rounds is 2"),
        ({"rollouts": ("parallel",)}, "no queries"),
    ],
)
def test_ranges_that_the_model_does_not_have_are_refused(checkpoint, given, words):
    with pytest.raises(ConfigError, match=words):
        check(replace(QUICK, **given), checkpoint.model.latent)


@pytest.mark.parametrize("given", [{"min_latents": 0}, {"min_rounds": 0}, {"rollouts": ()}])
def test_ranges_that_no_model_has_are_refused(given):
    with pytest.raises(ConfigError, match=next(iter(given))):
        replace(QUICK, **given)


def test_as_many_rounds_as_latents_are_the_recurrent_rollout(make_checkpoint, rows, tmp_path):
    """Catches a drawn rollout that is not run, and slots that do not fit the latents that were drawn."""
    checkpoint = make_checkpoint(**{**SMALL, "latent": PARALLEL})
    batch = shorten(a_batch(checkpoint, rows, tmp_path), 2)
    trainee = Trainee(learner.build(checkpoint, QUICK), QUICK)
    with torch.no_grad():
        losses = {
            (kind, rounds): trainee(batch, Draw(rounds, False, 2, kind)).loss.total
            for kind, rounds in (("recurrent", 1), ("parallel", 2), ("parallel", 1))
        }
    assert_close(losses["parallel", 2], losses["recurrent", 1])
    assert losses["parallel", 1] != losses["parallel", 2]


def test_a_run_draws_from_all_ranges(make_checkpoint, rows, tmp_path):
    """Catches a draw that a step of the loop cannot follow."""
    checkpoint = make_checkpoint(**{**SMALL, "latent": PARALLEL})
    ranges = {"min_latents": 1, "min_rounds": 1, "rollouts": ("recurrent", "parallel")}
    chosen = replace(QUICK, **ranges, objective=Objective(teacher="ema"))
    loop.train(checkpoint.path, rows, tmp_path / "run", chosen)
    assert np.isfinite(metrics(tmp_path / "run")).all()


# --- ends ---------------------------------------------------------------------------------------------------------


def test_the_end_of_the_latents_is_predicted_where_the_model_stops_there(checkpoint):
    """Catches an end that nothing is trained to predict, and slots before it that would predict it too."""
    model = replace(checkpoint.model, latent=replace(checkpoint.model.latent, stop="end_token"))
    sample = encode(checkpoint, "Which?", model)
    plan, (first, last), (start, _) = model.latent, sample.slots, sample.answer
    expected = [IGNORED, plan.pad_token_id, plan.pad_token_id, plan.end_token_id]
    assert sample.labels[first : last + 1].tolist() == expected
    assert (sample.labels[:first] == IGNORED).all()
    assert torch.equal(sample.labels[start:], sample.ids[start:])
    assert (encode(checkpoint, "Which?").labels[: sample.answer[0]] == IGNORED).all()


def test_a_model_learns_when_its_latents_end(make_checkpoint, rows, tmp_path):
    """Catches a label one token off: inference stops where the state of a slot predicts the end."""
    checkpoint = make_checkpoint(**{**SMALL, "latent": ENDING})
    chosen = replace(QUICK, steps=25, batch_size=4, save_every=100)
    loop.train(checkpoint.path, rows, tmp_path / "run", chosen)
    from vlrt.checkpoint import Checkpoint

    trained = Checkpoint.open(tmp_path / "run" / loop.MODEL)
    trainee = Trainee(learner.build(trained, chosen), chosen)
    batch = a_batch(trained, rows, tmp_path)
    seen = []

    def see(logits, labels, *, given=objective.cross_entropy):
        seen.append((logits.argmax(-1), labels))
        return given(logits, labels)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(objective, "cross_entropy", see)
        right = trainee(batch, Draw(1, False)).right
    (found, labels) = seen[0]
    plan = trained.model.latent
    ends = torch.isin(labels, torch.tensor([plan.pad_token_id, plan.end_token_id]))
    assert ends.sum() == 3 * len(batch.ids)
    assert torch.equal(found[ends], labels[ends])
    assert right.shape == (2,)


# --- bf16 ---------------------------------------------------------------------------------------------------------


def logits_and_latents(trainee, batch, drawn):
    seen = {}

    def see(logits, labels, *, given=objective.cross_entropy):
        seen["logits"] = logits
        return given(logits, labels)

    def see_latents(ce, latents, aims, chosen, *, given=objective.combine):
        seen["latents"] = latents
        return given(ce, latents, aims, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "cross_entropy", see)
        patch.setattr(objective, "combine", see_latents)
        loss = trainee(batch, drawn).loss.total
    return loss, seen["logits"].detach(), seen["latents"].detach()


@pytest.mark.parametrize("latent", [SMALL["latent"], PARALLEL], ids=["recurrent", "parallel"])
def test_bf16_errs_no_more_than_a_model_wholly_in_bf16(make_checkpoint, rows, tmp_path, latent):
    """Catches masks, positions or caches that autocast rounds, and a rollout in another precision than the pass."""
    checkpoint = make_checkpoint(**{**SMALL, "latent": latent})
    batch = a_batch(checkpoint, rows, tmp_path)
    drawn = Draw(latent.get("rounds", 1), True)
    trainee = {kind: Trainee(learner.build(checkpoint, QUICK), QUICK) for kind in ("fp32", "fp64", "bf16", "auto")}
    trainee["fp64"].double()
    trainee["bf16"].bfloat16()
    tokens = trainee["fp32"]._video_tokens(batch)
    found = {}
    for kind, one in trainee.items():  # the tower is frozen and in fp32 for all
        dtype = torch.float32 if kind == "auto" else one.model.lm_head.weight.dtype
        with torch.autocast("cpu", torch.bfloat16, enabled=kind == "auto"):
            found[kind] = logits_and_latents(one, encoded(batch, [part.to(dtype) for part in tokens]), drawn)
    for out, exact, plain in zip(found["auto"][1:], found["fp64"][1:], found["bf16"][1:], strict=True):
        assert_close(out.bfloat16(), exact, plain=plain.bfloat16())
    loss = found["auto"][0]
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainee["auto"].parameters())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = trainee["auto"]._video_tokens(batch)
    assert all(torch.equal(a, b) for a, b in zip(autocast, tokens, strict=True))  # a frozen tower's


@pytest.mark.parametrize("bptt", ["0", "1", "full"])
def test_a_run_in_bf16_stays_close_to_one_in_fp32(checkpoint, rows, tmp_path, bptt):
    """Catches a backward pass that autocast breaks. A step's loss differs by bf16's rounding of it, a few times."""
    for precision in ("fp32", "bf16"):
        chosen = replace(QUICK, steps=2, precision=precision, train_vision=True, objective=Objective(bptt=bptt))
        loop.train(checkpoint.path, rows, tmp_path / precision, chosen)
    out, ref = (torch.tensor(metrics(tmp_path / precision)[:1]) for precision in ("bf16", "fp32"))
    assert_close(out.bfloat16(), ref)
    assert np.isfinite(metrics(tmp_path / "bf16")).all()
    assert metrics(tmp_path / "bf16") != metrics(tmp_path / "fp32")


# --- batches ------------------------------------------------------------------------------------------------------


def test_a_tower_that_learns_runs_once_for_videos_of_several_sizes(make_checkpoint):
    """Catches windows and segments that reach into the next video, and tokens handed to the wrong one."""
    checkpoint = make_checkpoint(**SMALL)
    trainee = Trainee(learner.build(checkpoint, QUICK), QUICK).double()
    grids = [(2, 8, 12), (1, 20, 4), (3, 2, 2)]
    width = checkpoint.model.vision.patch_dim
    generator = torch.Generator().manual_seed(0)
    pixels = [torch.randn(t * h * w, width, generator=generator, dtype=torch.float64) for t, h, w in grids]
    with torch.no_grad():
        together = trainee._encode(pixels, grids)
        for patches, grid, out in zip(pixels, grids, together, strict=True):
            (alone,) = trainee._encode([patches], [grid])
            assert_close(out, alone)


def test_processes_share_what_is_evaluated(monkeypatch):
    """Catches a question that counts twice or not at all, and a process that waits for one that is done."""
    found = {}
    for process in (0, 1):
        monkeypatch.setattr(order, "processes", lambda process=process: (process, 2))
        found[process] = order.held_out(5, 2)
    assert found[0] == ([0, 1, 4], 2)
    assert found[1] == ([2, 3, 0, 1], 1)  # its second batch runs along and does not count
    monkeypatch.setattr(order, "processes", lambda: (0, 1))
    assert order.held_out(5, 2) == ([0, 1, 2, 3, 4], 3)


def test_processes_take_neighbouring_batches_of_one_order():
    """Catches processes that read the same samples, and an order other than that of one process."""
    one = iter(order.Order(7, 4, 0, 3, 0, 1))
    two = [iter(order.Order(7, 2, 0, 3, process, 2)) for process in (0, 1)]
    for _ in range(6):
        assert [next(one) for _ in range(4)] == [next(of) for of in two for _ in range(2)]


def test_the_scale_of_latents_is_trained_where_something_reaches_it(checkpoint):
    """Catches a gradient of rounding alone, of which Adam would make steps of full size."""
    for bptt, learns in (("0", False), ("1", True), ("full", True)):
        model = learner.build(checkpoint, replace(QUICK, objective=Objective(bptt=bptt)))
        assert model.latent_injection.rho.requires_grad == learns


@pytest.mark.parametrize("hides_video", [False, True])
@pytest.mark.parametrize(
    "latent", [SMALL["latent"], PARALLEL, {**PARALLEL, "rounds": 1}], ids=["recurrent", "parallel", "one round"]
)
def test_an_answer_behind_the_rollout_is_that_of_a_whole_pass(make_checkpoint, rows, tmp_path, latent, hides_video):
    """Catches positions, masks or padding of answers that go on from the rollout's cache, and gradient that is lost."""
    checkpoint = make_checkpoint(**{**SMALL, "latent": latent})
    batch = a_batch(checkpoint, rows, tmp_path)
    settings = replace(QUICK, objective=Objective(bptt="full"))
    found = []
    for goes_on in (True, False):
        trainee = Trainee(learner.build(checkpoint, settings), settings).double()
        if not goes_on:
            trainee._foresees = lambda *_: False
        tokens = [part.double() for part in Trainee(learner.build(checkpoint, settings), settings)._video_tokens(batch)]
        step = trainee(encoded(batch, tokens), Draw(latent.get("rounds", 1), hides_video))
        step.loss.total.backward()
        found.append((step, {name: p.grad for name, p in trainee.named_parameters() if p.grad is not None}))
    (out, grads), (ref, ref_grads) = found
    torch.testing.assert_close(tuple(out.loss), tuple(ref.loss), rtol=1e-9, atol=1e-12)
    assert torch.equal(out.right, ref.right)
    assert grads.keys() == ref_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, ref_grads[name], rtol=1e-6, atol=1e-9, msg=name)


def levelled(levels):
    return [triplets.Triplet(i, i, Path("a.mp4"), "Which?", "no", metadata=m) for i, m in enumerate(levels, 1)]


def test_a_curriculum_asks_low_levels_first_and_all_later():
    """Catches a hard row that is asked early, a row without a level left out, and levels that never come."""
    rows = levelled([{"n": 8}, {"n": 1}, {}, {"n": 3}, {"n": 1}, {"n": 8}])
    settings = replace(QUICK, steps=6, accumulation=2, curriculum="n", curriculum_share=0.5)
    curriculum = order.Curriculum.of(rows, settings)
    asked = iter(order.Order(6, 5, 0, 0, 0, 1, curriculum))
    batches = [[next(asked) for _ in range(5)] for _ in range(12)]
    allowed = [{1, 2, 4}] * 2 + [{1, 2, 3, 4}] * 2 + [set(range(6))] * 8
    assert all(set(batch) <= rows for batch, rows in zip(batches, allowed, strict=True))
    assert set().union(*batches[:2]) == {1, 2, 4}
    assert set().union(*batches[4:]) == set(range(6))
    late = iter(order.Order(6, 5, 0, 3, 0, 1, curriculum))  # a run that goes on asks what it would have
    assert [next(late) for _ in range(5)] == batches[3]


def test_a_curriculum_adds_a_level_once_enough_of_the_newest_is_answered_right():
    """Catches levels that come early, by few rows or by easy ones, and a state that is not gone on from."""
    rows = levelled([{"n": 5}, {"n": 2}, {}, {"n": 3}])
    settings = replace(QUICK, curriculum="n", curriculum_exact=0.75)
    curriculum, right, wrong = order.Curriculum.of(rows, settings), torch.ones(32).bool(), torch.zeros(32).bool()
    assert [curriculum.highest(batch) for batch in (0, 10**6)] == [0, 0]
    curriculum.learn([2] * 32, right)  # all right, but few
    curriculum.learn([2] * 32, right)
    assert curriculum.newest == 0
    curriculum.learn([None] * 32, right)  # rows without a level are of the lowest
    assert curriculum.newest == 1
    for _ in range(20):
        curriculum.learn([2] * 32, right)  # of a level that was there before
        curriculum.learn([3] * 32, wrong)
    assert curriculum.newest == 1
    later = order.Curriculum.of(rows, settings)
    later.state = curriculum.state
    added = []
    for _ in range(8):
        for each in (curriculum, later):
            each.learn([3] * 32, right)
        added.append(curriculum.newest == 2)
        assert later.newest == curriculum.newest
    assert added.index(True) == 5  # what was wrong weighs (1 - 1/128) ** (32 * 6) = 0.22 by then, and 0.29 before
    for _ in range(9):
        curriculum.learn([5] * 32, right)
    assert curriculum.newest == 2  # there are no more


def test_a_curriculum_over_what_no_row_has_is_refused():
    """Catches a misspelt name that leaves the order as it is."""
    with pytest.raises(ConfigError, match="metadata"):
        order.Curriculum.of(levelled([{"n": "many"}, {}]), replace(QUICK, curriculum="n"))
