"""What tests of training share: clips with questions, small settings, and runs in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.videos import make, picture
from vlrt.train import loop
from vlrt.train.settings import Settings

SMALL = {
    "overrides": {"decoder.num_layers": 2, "vision.depth": 2, "vision.full_attention_layers": [1]},
    "latent": {"num_latents": 3, "num_heads": 4},
}
QUICK = Settings(steps=4, batch_size=2, learning_rate=3e-3, warmup=1, workers=0, save_every=2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Compute in one thread: on a busy machine threads of tiny models wait for each other, for minutes in all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_triplets(folder: Path, count: int = 4) -> Path:
    """Write clips, each with a question (of several lengths), a letter to answer and a chain of thought."""
    rows = []
    for i in range(count):
        pictures = [picture(10 * i + t, 56, 56) for t in range(4)]
        make(folder / f"{i}.mp4", frames=4, height=56, width=56, pictures=pictures)
        row = {"video": f"{i}.mp4", "question": f"Which way {i}{' now' * i}?", "answer": "ab"[i % 2]}
        if i % 3:
            row |= {"choices": ["a", "b"]}
        else:
            row |= {"answer": f"to {'ab'[i % 2]}, said {i}"}  # longer than a letter: tokens differ among samples
        rows.append(json.dumps({**row, "cot": f"First {i}. Then {i}."}))
    (folder / "triplets.jsonl").write_text("\n".join(rows))
    return folder / "triplets.jsonl"


def metrics(out: Path, name: str = "total") -> list[float]:
    """Return a measure of every step of a run."""
    return [json.loads(line)[name] for line in (out / loop.METRICS).read_text().splitlines()]


def weights(out: Path) -> dict:
    """Return the tensors that a finished run wrote."""
    return load_file(out / loop.MODEL / "model.safetensors")


def arguments(checkpoint: Path, data: Path, out: Path, *settings: str) -> list[str]:
    """Return a command line of `vlrt train` with the settings of QUICK, and others."""
    quick = ["steps=4", "batch_size=2", "learning_rate=3e-3", "warmup=1", "workers=0", "save_every=2"]
    pairs = [part for pair in (*quick, *settings) for part in ("--set", pair)]
    return ["train", "--model", str(checkpoint), "--data", str(data), "-o", str(out), *pairs]


def launch(*command: str, processes: int = 1, cwd: Path | None = None) -> subprocess.Popen:
    """Start `python -m vlrt ...`, or as many of it as torchrun is told to."""
    start = [sys.executable, "-m", "vlrt"]
    if processes > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        start += ["-m", "vlrt"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*start, *command], stdout=-1, stderr=-1, text=True, env=environment, cwd=cwd, start_new_session=True
    )
