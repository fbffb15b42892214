"""The suite for a GPU, in tiny sizes on the CPU, so that it does not break on a card for a reason that has none."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benches.gpu import parts, targets
from benches.gpu.phases import PHASES
from benches.gpu.suite import Suite

ROOT = Path(__file__).parent.parent
# What the machine with the card may lack: found by nobody, as if it were not installed.
MISSING = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
missing = {"av", "PIL", "rich", "onnx", "onnxscript", "accelerate", "peft"}
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name in missing else found(name, *rest))
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a whole run, and what it printed."""
    out = tmp_path_factory.mktemp("gpu")
    (out / "sitecustomize.py").write_text(MISSING)
    environment = os.environ | {"PYTHONPATH": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benches.gpu", "--device", "cpu", "--tiny", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    logs = "".join(file.read_text() for file in (out / "logs").glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    return out, run.stdout


def numbers(values):
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from numbers(value)
    elif isinstance(values, int | float) and not isinstance(values, bool):
        yield values


def test_every_phase_ends_with_finite_numbers(finished):
    """Catches an item that crashes, a check or a case that fails unseen, and a time that is no number."""
    out, _ = finished
    result = json.loads((out / "results.json").read_text())
    assert {name: set(items) for name, items in result["phases"].items()} == {
        phase.name: set(phase.items) for phase in PHASES
    }
    for items in result["phases"].values():
        for part in items.values():
            assert all(math.isfinite(number) for number in numbers(part["result"]))
            for row in part["result"].get("rows", []):
                assert not {"error", "skipped"} & set(row), row
    for item in result["phases"]["kernels"].values():
        assert all(row["seconds"]["median"] > 0 for row in item["result"]["rows"])


def test_every_target_is_read_from_what_the_phases_write(finished):
    """Catches a target that looks for a name that no phase writes: it would say "not measured" for ever."""
    out, printed = finished
    found = parts.read(out)
    for item, cases in (
        ("video_attention", [f"S={n} past=0" for n in (2048, 4096, 8192)]),
        ("segment_attention", [f"N={n} segment={size}" for n in (8192, 32_768) for size in (64, 256)]),
    ):
        row = found["kernels"][item]["result"]["rows"][0]
        found["kernels"][item]["result"]["rows"] = [{**row, "case": case} for case in cases]
    for seconds in found["answers"]["vlrt"]["result"]["seconds"].values():  # noise may make latents as fast as none
        seconds["median"] = 1.0
    found["answers"]["vlrt"]["result"]["seconds"]["direct"]["median"] = 0.5
    assert all(row["reached"] is not None for row in targets.rows(found))
    assert all(row["target"] in printed for row in targets.rows(found))


def test_tuned_configs_go_before_the_shipped_ones(finished):
    """Catches a file that leaves other cards without a config, and one that is written into the tree."""
    out, _ = finished
    for file in ("video_attention", "decode_attention", "segment_attention"):
        new = json.loads((out / "configs" / f"{file}.json").read_text())
        shipped = json.loads((ROOT / "kernels" / "configs" / f"{file}.json").read_text())
        assert new["rows"][-len(shipped["rows"]) :] == shipped["rows"]
        assert new["tuned"]
        assert new["rows"][0]["config"].keys() == shipped["rows"][0]["config"].keys()


class Dying(Suite):
    """Workers that die at the item "b"."""

    def _start(self, specs, seconds, log):
        self._log(log).parent.mkdir(parents=True, exist_ok=True)
        self._log(log).write_text("the last words\n")
        for spec in specs:
            if spec.endswith("/b"):
                return subprocess.Popen([sys.executable, "-c", "import os; os._exit(7)"])
            parts.write(self.out, *spec.split("/"), result={"rows": []}, seconds=0.0)
        return subprocess.Popen([sys.executable, "-c", ""])


def test_a_worker_that_dies_is_blamed_and_the_others_run(tmp_path):
    """Catches a broken kernel that takes the rest of its phase with it."""
    suite = Dying(tmp_path, "cuda", True, 60.0, [])
    suite._until_done(["x/a", "x/b", "x/c"], 60.0, "x")
    found = parts.read(tmp_path)["x"]
    assert "result" in found["a"]
    assert "result" in found["c"]
    assert "status 7" in found["b"]["error"]
    assert "the last words" in found["b"]["error"]
    assert "FAILED x/b: the last words" in targets.table([], parts.read(tmp_path))


def test_what_finds_no_time_says_so(tmp_path):
    """Catches a phase that starts when its time is over."""
    Suite(tmp_path, "cuda", True, 0.0, [])._until_done(["x/a"], 0.0, "x")
    assert parts.read(tmp_path)["x"]["a"]["skipped"] == "out of time"


def test_without_a_gpu_a_full_run_is_refused():
    """Catches hours on a CPU that were meant for a card."""
    command = [sys.executable, "-m", "benches.gpu", "--device", "cpu"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert "--tiny" in run.stderr
