"""Several processes under torchrun do what one does: gloo on the CPU, weights divided between two (FSDP)."""

import json
import os
import signal
import time

import pytest

from tests.training import SMALL, arguments, launch, metrics, weights, write_triplets
from vlrt.checkpoint import Checkpoint
from vlrt.train import loop

VARIANTS = {
    "all weights": ["objective.bptt=full", "train_vision=true", "max_grad_norm=0.5"],
    "adapters and a teacher": ["lora.rank=2", "objective.teacher=ema", "objective.teacher_decay=0.5"],
}


def finish(process):
    out, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return out


@pytest.fixture(scope="module")
def room(tmp_path_factory, make_checkpoint):
    room = tmp_path_factory.mktemp("room")
    return make_checkpoint(**SMALL).path, write_triplets(room, 5), room


@pytest.mark.parametrize(("variant", "killed"), [("all weights", False), ("adapters and a teacher", True)])
def test_two_processes_do_what_one_does_with_batches_of_twice_the_size(room, variant, killed, tmp_path):
    """Catches gradients that are summed or averaged by process instead of by token, and lost or mixed-up shares.

    Also those that return to the wrong process after a kill.

    Losses and gradient norms of the first step are sums in another order. After it Adam divides rounding by rounding
    where gradients vanish, so that weights are compared by how far they went: a hundredth of it.
    """
    checkpoint, data, _ = room
    given = [*VARIANTS[variant], "eval_every=2"]
    one = launch(*arguments(checkpoint, data, tmp_path / "one", "batch_size=4", *given), "--validation", str(data))
    command = [*arguments(checkpoint, data, tmp_path / "two", *given), "--validation", str(data)]
    two = launch(*command, processes=2)
    if killed:
        while two.poll() is None and not (tmp_path / "two" / loop.STATE).exists():
            time.sleep(0.001)
        os.killpg(two.pid, signal.SIGKILL)
        two.communicate()
        two = launch(*command, processes=2)
    assert finish(one).splitlines() == [str(tmp_path / "one" / loop.MODEL)]
    assert finish(two).splitlines() == [str(tmp_path / "two" / loop.MODEL)]  # the main process alone prints
    for name in ("total", "cross_entropy", "alignment", "diversity", "exact", "grad_norm"):
        ref, out = metrics(tmp_path / "one", name), metrics(tmp_path / "two", name)
        assert out[0] == pytest.approx(ref[0], rel=2e-6, abs=2e-6), name  # 16 ulps
    ref, out = weights(tmp_path / "one"), weights(tmp_path / "two")
    start = Checkpoint.open(checkpoint)
    moved = apart = 0.0
    for name, tensor in ref.items():
        moved += float((tensor - start.tensor(name)).pow(2).sum())
        apart += float((out[name] - tensor).pow(2).sum())
    assert moved > 0
    assert apart**0.5 <= 0.01 * moved**0.5
    ref, out = (validation_losses(tmp_path / name) for name in ("one", "two"))
    assert len(out) == 2
    assert out == pytest.approx(ref, rel=0.01)


def validation_losses(run):
    lines = map(json.loads, (run / loop.METRICS).read_text().splitlines())
    return [line["validation_loss"] for line in lines if "validation_loss" in line]
