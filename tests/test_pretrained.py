"""The models that come with the package answer questions about clips that they have not seen."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import vlrt
from vlrt import pretrained
from vlrt.export import exporter
from vlrt.train import synthetic, triplets

DEMO = Path(__file__).parent.parent / "examples" / "demo.py"
SEED = 77_000  # of no training, validation or test set


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[triplets.Triplet]:
    """Where the ball is after each of the swaps in 30 clips of the test split."""
    folder = tmp_path_factory.mktemp("clips") / "cups"
    settings = synthetic.Synthetic(seed=SEED, split="test", families=("cups",), forms=("free",), num_swaps=(4, 4))
    synthetic.write(folder, settings, 30, workers=1)
    return list(triplets.read(folder / synthetic.STEPS).rows)


def scores(bundle: Path, questions: list[triplets.Triplet], **options: object) -> dict[int, float]:
    """Return the share of right answers by number of swaps."""
    right: dict[int, list[bool]] = {}
    with vlrt.Runtime.open(bundle, threads=1) as runtime:
        for row in questions:
            said = runtime.ask(row.video, row.asked, **options).text  # type: ignore[arg-type]
            right.setdefault(int(row.metadata["num_swaps"]), []).append(said == row.answer)
    return {swaps: sum(found) / len(found) for swaps, found in right.items()}


def test_the_latent_model_follows_the_ball(questions, tmp_path):
    """Catches weights that are damaged, of another model, or lost in bf16, and an engine that runs them otherwise."""
    bundle = exporter.export(pretrained.find("shapes-latent"), tmp_path / "latent.vlrt")
    own = scores(bundle, questions)
    assert min(own.values()) >= 0.9  # its card says 1.0 on a hundred clips of each number of swaps


def test_the_model_with_chains_follows_the_ball(questions, tmp_path):
    bundle = exporter.export(pretrained.find("shapes-cot"), tmp_path / "cot.vlrt")
    own = scores(bundle, questions, reasoning="cot")
    assert min(own.values()) >= 0.9


def test_the_demo_asks_about_fresh_clips_and_says_what_is_right(tmp_path):
    """Catches a demo that no longer fits the models, the clips or the runtime."""
    command = [sys.executable, str(DEMO), "--seed", str(SEED)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    right = re.search(r"shapes-latent: (\d) of 6 right", done.stdout)
    assert right is not None
    assert len(re.findall(r"latents\): \w+  right", done.stdout)) == int(right[1])
    assert re.search(r"The chain takes [\d.]+ times as long as the latents", done.stdout)
    with Image.open(tmp_path / "demo" / "answers.png") as sheet:
        assert sheet.size[0] > 7 * 84
        assert len(sheet.getcolors(1_000_000) or ()) > 100
