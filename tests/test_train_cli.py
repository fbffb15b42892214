"""`vlrt train` as people run it: made-up data, YAML, a checkpoint without latents, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import arguments, launch
from vlrt.checkpoint import Checkpoint
from vlrt.fresh import write_checkpoint

YAML = """\
steps: 2
batch_size: 2
workers: 0
precision: bf16
min_latents: 1
objective:
  bptt: 1
  teacher: ema
"""


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds plain/ (a checkpoint without latents), clips/triplets.jsonl and run.yaml."""
    room = tmp_path_factory.mktemp("room")
    small = {"decoder.num_layers": 2, "vision.depth": 2, "vision.full_attention_layers": [1]}
    write_checkpoint(room / "plain", latent=None, overrides=small)
    made = run(room, "data", "synth", "clips", "--n", "7", "--workers", "1")
    assert made.returncode == 0, made.stderr
    (room / "run.yaml").write_text(YAML)
    (room / "bad.jsonl").write_text('{"video": "none.mp4", "question": "Where?", "answer": "here"}\n')
    (room / "bad.yaml").write_text("steps: many\n")
    return room


def run(room: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    start = [sys.executable, "-m", "vlrt", *command]
    return subprocess.run(start, cwd=room, capture_output=True, text=True, timeout=300, env=environment)


GIVEN = ["train", "--model", "plain", "--data", "clips/triplets.jsonl", "--config", "run.yaml"]


def test_a_plain_checkpoint_learns_to_reason_in_latents(room):
    """Catches a YAML file that is not read, latents that are not added, and a run that does not say where it went."""
    command = [*GIVEN, "-o", "run", "--latents", "3", "--set", "steps=3", "--validation", "clips/triplets.jsonl"]
    done = run(room, *command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["run/model"]
    assert done.stderr == ""
    trained = Checkpoint.open(room / "run" / "model")
    assert trained.model.latent is not None
    assert trained.model.latent.num_latents == 3
    assert Checkpoint.open(room / "run.start").model.latent == trained.model.latent
    lines = [json.loads(line) for line in (room / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "validation_exact" in lines[-1]
    settings = json.loads((room / "run" / "settings.json").read_text())["settings"]
    assert (settings["objective"]["teacher"], settings["precision"], settings["min_latents"]) == ("ema", "bf16", 1)
    again = run(room, *command)
    assert (again.returncode, again.stdout) == (0, "run/model\n")


def test_what_cannot_be_trained_ends_in_one_line(room):
    """Catches tracebacks, and runs that begin before what they are given is read."""
    refused = {
        "steps is 'many'": [*GIVEN[:-1], "bad.yaml", "-o", "out0"],
        "unknown setting stepz": [*GIVEN, "--set", "stepz=2", "-o", "out1"],
        "does not exist": [*GIVEN[:4], "bad.jsonl", "-o", "out2"],
        "none.jsonl cannot be read": [*GIVEN[:4], "none.jsonl", "-o", "out3"],
        "accepted: at most the model's": [*GIVEN, "--set", "min_latents=9", "-o", "out4"],
        "is not empty": [*GIVEN, "-o", "clips"],
    }
    started = {words: launch(*command, cwd=room) for words, command in refused.items()}
    for words, process in started.items():
        out, errors = process.communicate(timeout=120)
        assert process.returncode == 1, errors
        assert out == ""
        assert errors.startswith("vlrt: error: ")
        assert errors.count("\n") == 1
        assert words in errors
    assert not list(room.glob("out?"))


def test_bad_rows_are_skipped_up_to_the_limit(room):
    rows = (room / "clips" / "triplets.jsonl").read_text()
    bad = (room / "bad.jsonl").read_text()
    (room / "clips" / "mixed.jsonl").write_text(rows + 2 * bad)
    command = [*arguments(room / "plain", room / "clips" / "mixed.jsonl", room / "mixed", "steps=1"), "--system=direct"]
    strict = launch(*command, "--set", "max_bad_rows=1", "-o", str(room / "strict"))
    done = launch(*command)
    _, errors = strict.communicate(timeout=120)
    assert strict.returncode == 1
    assert "mixed.jsonl has 2 bad rows or more" in errors
    assert "line 8:" in errors
    _, errors = done.communicate(timeout=120)
    assert done.returncode == 0, errors
