"""The teacher: a slow copy of the weights that is told the answer, and what its latents are used for."""

from dataclasses import replace
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
    weights,
    write_triplets,
)
from vlrt import prompt
from vlrt.preprocess import Patches
from vlrt.train import data, learner, loop, objective, triplets
from vlrt.train.data import VideoQuestions, collate
from vlrt.train.settings import Lora, Objective
from vlrt.train.system import Draw, Trainee
from vlrt.train.teacher import Teacher

TAUGHT = replace(QUICK, objective=Objective(teacher="ema", teacher_decay=0.5))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_triplets(tmp_path_factory.mktemp("triplets"))


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint):
    return make_checkpoint(**SMALL)


def a_batch(checkpoint, rows, folder, *, tells_answer=True):
    found = triplets.read(rows).rows
    questions = VideoQuestions(
        found, checkpoint.path, checkpoint.model, "latent", folder / "frames", tells_answer=tells_answer
    )
    return collate([questions[0], questions[1]])


def test_a_slow_copy_by_hand_and_swapped_in_place():
    """Catches the decay on the wrong term, and weights that are not given back, also after an error."""
    weight = torch.nn.Parameter(torch.tensor([2.0]))
    teacher = Teacher({"w": weight}, 0.75)
    with torch.no_grad():
        weight.fill_(6.0)
    teacher.follow()
    assert teacher.slow["w"].item() == 0.75 * 2 + 0.25 * 6
    seen = []

    def fail():
        with teacher.in_place():
            seen.append(weight.item())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [3.0]
    assert weight.item() == 6.0
    assert teacher.slow["w"].item() == 3.0
    assert not teacher.slow["w"].requires_grad


def test_the_teacher_is_told_the_answer_by_the_user(checkpoint):
    """Catches an answer that also reaches the student, and positions that do not follow."""
    row = triplets.Triplet(1, 1, Path("a.mp4"), "Which?", "b", ("a", "b"))
    patches = Patches(np.zeros((32, 1176), np.float32), (2, 4, 4), 1.0, False)
    tokenizer = prompt.Tokenizer.open(checkpoint.path)
    plain = data.encode(row, patches, tokenizer, checkpoint.model, "latent")
    told = data.encode(row, patches, tokenizer, checkpoint.model, "latent", tells_answer=True)
    assert plain.told_ids.shape == (0,)
    assert torch.equal(told.ids, plain.ids)
    media = [prompt.Media(False, (2, 4, 4), 1.0)]
    asked = "Which?\nA. a\nB. b\nThe right answer is: B"
    ref = prompt.build(tokenizer, checkpoint.model, asked, media, reasoning="latent")
    assert told.told_ids.tolist() == ref.ids.tolist()
    assert ref.spans[0].start == told.video[0]
    assert told.told_at.shape == (3, len(ref.ids))
    assert told.told_next == int(told.told_at[:, -1].max()) + 1


def test_the_latents_of_the_teacher_are_what_is_aligned_with(checkpoint, rows, tmp_path):
    """Catches segments that stay the targets in one of the two terms, and a gradient into the teacher."""
    batch = a_batch(checkpoint, rows, tmp_path)
    trainee = Trainee(learner.build(checkpoint, TAUGHT), TAUGHT)
    drawn = Draw(1, False)
    aims = trainee.roll_out_told(batch, drawn)
    assert aims.shape == (2, 3, checkpoint.model.decoder.hidden_size)
    assert not aims.requires_grad
    found = {}

    def see(ce, latents, given, chosen, *, combine=objective.combine):
        found["terms"] = objective.alignment(latents, given), objective.diversity(latents, given)
        found["aims"] = given
        return combine(ce, latents, given, chosen)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "combine", see)
        loss = trainee(batch, drawn, aims).loss
    assert found["aims"] is aims
    assert_close(torch.stack([loss.alignment, loss.diversity]).detach(), torch.stack(found["terms"]).detach())
    assert loss.alignment != trainee(batch, drawn).loss.alignment


def test_what_the_teacher_sees_depends_on_the_answer(checkpoint, rows, tmp_path):
    """Catches a rollout of the student's own prompt: without the hint both have the same latents."""
    batch = a_batch(checkpoint, rows, tmp_path)
    trainee = Trainee(learner.build(checkpoint, TAUGHT), TAUGHT)
    told = trainee.roll_out_told(batch, Draw(1, False))
    same = replace(
        batch,
        told_ids=batch.ids[:, : int(batch.prompt_lengths.max())],
        told_at=batch.at[:, :, : int(batch.prompt_lengths.max())],
        told_lengths=batch.prompt_lengths,
        told_next=batch.next_positions,
    )
    untold = trainee.roll_out_told(same, Draw(1, False))
    assert not torch.allclose(told, untold, rtol=1e-3)
    loss = trainee(batch, Draw(1, False), untold).loss  # one pass in place of a rollout: the same latents again
    assert_close(1 + loss.alignment.detach(), torch.ones(()), plain=1 + loss.alignment.detach())


@pytest.mark.parametrize("lora", [None, Lora(rank=2, alpha=4)])
def test_a_run_with_a_teacher_goes_on_as_if_never_stopped(checkpoint, rows, tmp_path, lora):
    """Catches a teacher that starts over when a run goes on; with adapters it copies what is trained alone."""
    chosen = replace(TAUGHT, lora=lora)
    loop.train(checkpoint.path, rows, tmp_path / "whole", chosen)

    class Killed(BaseException):
        pass

    def die(step, measured):
        if step == 3:
            raise Killed

    with pytest.raises(Killed):
        loop.train(checkpoint.path, rows, tmp_path / "cut", chosen, report=die)
    loop.train(checkpoint.path, rows, tmp_path / "cut", chosen)
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ref = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, ref[name]) for name, tensor in weights(tmp_path / "cut").items())


def test_a_teacher_copies_what_is_trained_alone(checkpoint):
    """Catches a second copy of frozen weights."""
    from accelerate import PartialState

    chosen = replace(TAUGHT, lora=Lora(rank=2, alpha=4))
    copied = learner.Learner(checkpoint, chosen, PartialState(cpu=True))._teacher.slow
    assert all("lora_" in name or "latent_injection" in name for name in copied)
    assert any("lora_" in name for name in copied)
