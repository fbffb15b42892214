"""The comparison of the four systems runs from nothing to its table, at sizes at which nothing is learned."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from vlrt.checkpoint import Checkpoint

SCRIPT = Path(__file__).parent.parent / "examples" / "reproduce.py"
CHOSEN = ("direct", "latent", "latent, asked with shuffled latents", "blind direct", "one-frame direct")


def test_every_stage_runs_and_is_kept(tmp_path):
    """Catches a stage that no longer fits the next, and one that is done again after an interruption."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--plan", "quick", "--only", *CHOSEN]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(rows) == set(CHOSEN)
    groups = {group["name"]: group for group in rows["latent"][0]}
    assert groups["all"]["num_rows"] == 22  # 14 clips, of which two are of cups, with four easier questions each
    assert sum(name.startswith("family: ") for name in groups) == 11
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("model.safetensors")}
    assert len(files) == 8  # fresh, backbone, the latents' start, what four became, and the packed one
    packed = tmp_path / "out" / "box" / "shapes-latent"
    assert Checkpoint.open(packed).dtype == "bfloat16"
    assert "seed 0" in (packed / "README.md").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.stdout == first.stdout
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_it_ends_itself_and_goes_on(tmp_path):
    """Catches processes that outlive a call of a few minutes, and an exit code that says all was done."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--plan", "quick", "--only", "direct"]
    stopped = subprocess.run([*command, "--minutes", "0.05"], capture_output=True, text=True, timeout=60)
    assert stopped.returncode == 75
    assert "it goes on" in stopped.stderr
    assert not (tmp_path / "out" / "report.md").exists()
    done = subprocess.run([*command, "--minutes", "5"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "report.md").exists()


def test_workers_end_with_a_script_that_is_killed(tmp_path):
    """Catches models that are trained on, unseen, after the script was killed: the next run would train them again."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--plan", "quick", "--only", "direct", "pause"]
    script = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not (tmp_path / "out" / "direct").exists():  # a worker has begun
            assert script.poll() is None
            time.sleep(0.2)
        workers = Path(f"/proc/{script.pid}/task/{script.pid}/children").read_text().split()
        assert workers
    finally:
        script.kill()
        script.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_shuffled_latents_are_those_of_another_video(monkeypatch):
    """Catches the latents of the question before, which was about the same video and needs much the same of it."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    reproduce = importlib.import_module("reproduce")
    asked = []

    class Runtime:
        model = SimpleNamespace(decoder=SimpleNamespace(hidden_size=4))

        def ask(self, video, question, latents=None):
            asked.append((video, latents))
            return SimpleNamespace(latents=f"{video}{question}")

    asker = reproduce.Asker(Runtime())
    for video, question in ("a1", "a2", "b1", "b2", "b3", "c1"):
        asker.ask(video, question, latents="shuffled")
    assert [given for _, given in asked[1::2]] == ["noise", "noise", "a2", "a2", "a2", "b3"]
    assert all(given is None for _, given in asked[::2])
