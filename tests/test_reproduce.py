"""The comparison of the four systems runs from nothing to its table, at sizes at which nothing is learned."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "examples" / "reproduce.py"
CHOSEN = ("direct", "latent", "asked with shuffled latents")


def test_every_stage_runs_and_is_kept(tmp_path):
    """Catches a stage that no longer fits the next, and one that is done again after an interruption."""
    command = [sys.executable, str(SCRIPT), str(tmp_path / "out"), "--plan", "quick", "--only", *CHOSEN]
    first = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    rows = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(rows) == set(CHOSEN)
    groups = {group["name"]: group for group in rows["latent"][0]}
    assert groups["all"]["num_rows"] == 14
    assert sum(name.startswith("family: ") for name in groups) == 7
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("model.safetensors")}
    assert len(files) == 5  # fresh, backbone, the latents' start, and what the two systems became
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.stdout == first.stdout
    assert {file: file.stat().st_mtime_ns for file in files} == files
