"""Runs that end before their time: killed at any moment, on a full disk, or by a loss that is no number."""

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training import (
    QUICK,
    SMALL,
    arguments,
    launch,
    metrics,
    one_thread,  # noqa: F401 - for every test here
    weights,
    write_triplets,
)
from vlrt.errors import CheckpointError, ConfigError
from vlrt.train import learner, loop, objective, run_directory

# Runs the command line and ends with SIGKILL inside the n-th call of a function; half of a file is there by then.
DRIVER = """
import os, signal, sys
from vlrt import cli
from vlrt.train import run_directory, save
name, calls = sys.argv[1], int(sys.argv[2])
place = {"save_file": run_directory, "forget_state": run_directory, "_write_weights": save, "replace": os}[name]
true = getattr(place, name)

def die(*given):
    global calls
    calls -= name != "replace" or str(given[1]).endswith("state.safetensors")
    if calls:
        return true(*given)
    if name == "save_file":
        true(*given)
        os.truncate(given[1], os.path.getsize(given[1]) // 2)
    if name == "_write_weights":
        true(*given)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(place, name, die)
sys.exit(cli.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory, make_checkpoint):
    room = tmp_path_factory.mktemp("room")
    return make_checkpoint(**SMALL).path, write_triplets(room)


def drive(name: str, calls: int, command: list[str]) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-c", DRIVER, name, str(calls), *command]
    return subprocess.run(start, capture_output=True, env=environment, timeout=120).returncode


def test_a_run_that_is_killed_at_any_moment_ends_as_one_that_was_not(room, tmp_path):
    """Catches a file that is half there: of the state, the log, the settings or the result."""
    given = ["steps=20", "save_every=3", "objective.teacher=ema", "lora.rank=2", "lora.dropout=0.3"]
    whole = launch(*arguments(*room, tmp_path / "whole", *given))
    command = arguments(*room, tmp_path / "cut", *given)
    assert drive("save_file", 1, command) == -signal.SIGKILL  # while the first state is written
    assert drive("replace", 2, command) == -signal.SIGKILL  # between the second state and its place
    process = launch(*command)
    while process.poll() is None and not run_directory.read_state(tmp_path / "cut")[0] >= 6:
        time.sleep(0.001)
    time.sleep(random.random() / 10)  # wherever it is now
    process.kill()
    process.communicate()
    assert drive("_write_weights", 1, command) == -signal.SIGKILL  # while the result is written
    assert drive("forget_state", 1, command) == -signal.SIGKILL  # when it is there, and the state is too
    assert launch(*command).wait(60) == 0
    assert whole.wait(60) == 0
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ref = weights(tmp_path / "whole")
    assert all(torch.equal(tensor, ref[name]) for name, tensor in weights(tmp_path / "cut").items())
    left = {path.name for path in (tmp_path / "cut").iterdir()}
    assert left == {loop.MODEL, loop.METRICS, loop.SETTINGS, loop.FRAMES, loop.TOKENS, run_directory.LOGS}


def test_a_log_goes_on_where_the_state_is(tmp_path):
    """Catches a line that was cut off, lines of steps that are done again, and none in TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with run_directory.log(tmp_path, 0) as log:
        for step in (1, 2, 3):
            log(step, {"total": float(step)})
    with (tmp_path / loop.METRICS).open("a") as file:
        file.write('{"step": 4, "tot')
    with run_directory.log(tmp_path, 2) as log:
        log(3, {"total": 30.0, "validation_loss": 1.0})
    lines = [json.loads(line) for line in (tmp_path / loop.METRICS).read_text().splitlines()]
    assert lines == [
        {"step": 1, "total": 1.0},
        {"step": 2, "total": 2.0},
        {"step": 3, "total": 30.0, "validation_loss": 1.0},
    ]
    board = EventAccumulator(str(tmp_path / run_directory.LOGS))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("total")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.step for event in board.Scalars("validation_loss")] == [3]


@pytest.mark.parametrize("limit_bytes", [0, 2_000, 200_000])
def test_a_full_disk_ends_a_run_in_one_line(room, tmp_path, limit_bytes):
    """Catches a traceback, and a state that went with the one that had no room. The limit is of a file's size."""
    command = arguments(*room, tmp_path / "run")
    process = subprocess.run(
        [sys.executable, "-m", "vlrt", *command],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes)),
    )
    assert process.returncode == 1, process.stderr
    assert process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith("vlrt: error: ")
    assert not (tmp_path / "run" / loop.MODEL).exists()
    assert not list((tmp_path / "run").glob(".*.part"))


def test_a_state_that_has_no_room_leaves_the_one_before(tmp_path, monkeypatch):
    run_directory.save_state(tmp_path, 1, {"weight/w": torch.ones(2)})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_directory, "save_file", full)
    with pytest.raises(CheckpointError, match="No space left"):
        run_directory.save_state(tmp_path, 2, {"weight/w": torch.zeros(2)})
    step, tensors = run_directory.read_state(tmp_path)
    assert step == 1
    assert torch.equal(dict(tensors)["weight/w"], torch.ones(2))


@pytest.mark.parametrize("content", [b"", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ", b"no tensors at all"])
def test_a_damaged_state_is_said_and_not_started_over(tmp_path, content):
    (tmp_path / loop.STATE).write_bytes(content)
    with pytest.raises(CheckpointError, match="remove it to start over"):
        run_directory.read_state(tmp_path)


def test_a_directory_that_cannot_be_written_is_said(room, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        loop.train(*room, tmp_path / "file" / "run", QUICK)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_ends_a_run_and_leaves_the_last_state(room, tmp_path, what, monkeypatch):
    """Catches weights that were stepped on before the loss was looked at, and a state of such weights."""
    steps = []

    def poison(logits, labels, *, given=objective.cross_entropy):
        value = given(logits, labels)
        if len(steps) < 3:
            return value
        return value * float("nan") if what == "loss" else (value - value.detach()).abs().sqrt() + value.detach()

    monkeypatch.setattr(objective, "cross_entropy", poison)
    with pytest.raises(ConfigError, match="in step 4 the loss is"):
        loop.train(*room, tmp_path / "run", replace(QUICK, steps=6), report=lambda step, _: steps.append(step))
    step, tensors = run_directory.read_state(tmp_path / "run")
    assert step == 2
    assert all(tensor.isfinite().all() for _, tensor in tensors)
    assert len(metrics(tmp_path / "run")) == 3
    monkeypatch.undo()
    out = loop.train(*room, tmp_path / "run", replace(QUICK, steps=6))
    assert Path(out).is_dir()


def test_a_step_is_the_same_however_it_is_divided_into_batches(make_checkpoint, room):
    """Catches a mean of means: answers of other lengths weigh otherwise. The losses are sums in another order."""
    from accelerate import PartialState

    from vlrt.checkpoint import Checkpoint
    from vlrt.train import order, triplets
    from vlrt.train.data import VideoQuestions

    found = {}
    checkpoint = Checkpoint.open(room[0])
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        chosen = replace(QUICK, batch_size=batch_size, accumulation=accumulation)
        rows = triplets.read(room[1]).rows
        questions = VideoQuestions(rows, room[0], checkpoint.model, "latent", room[1].parent / "frames")
        bad = triplets.BadRows("rows", 0)
        one = learner.Learner(checkpoint, chosen, PartialState(cpu=True))
        found[batch_size] = one.step(0, order.batches(questions, chosen, 0, None), bad)
    for name, value in found[4].items():
        assert found[2][name] == pytest.approx(value, rel=2e-6, abs=2e-6), name  # 16 ulps
        assert found[1][name] == pytest.approx(value, rel=2e-6, abs=2e-6), name
