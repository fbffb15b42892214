"""The quick set (`pytest benches/`): every bench of the report, in under 10 minutes on two quiet cores.

What the first run exports takes minutes more. Each bench verifies its answers itself; asserted here is that it measured
what the report needs. The last writes the report.
"""

import json

import numpy as np
import pytest

from benches import bench_cold, bench_latent_vs_cot, bench_limits, bench_peers, bench_scaling, material, report
from vlrt import generate, preprocess, prompt, video
from vlrt.backends import select
from vlrt.bench import QUESTION
from vlrt.bundle import Bundle


def test_limits(quick):
    words = ["--shape", quick.shape, "--threads", quick.threads, "--rounds", quick.pick(5, 1)]
    words += quick.pick(["--frames", 16, 64], ["--frames", 4, 8, "--tiny-ceilings"])
    found = json.loads(bench_limits.main(quick.arguments("limits", *words)).read_text())
    assert len(found["rows"]) == 2


def test_latent_vs_cot(quick):
    words = ["--shape", quick.shape, "--threads", quick.threads, "--rounds", quick.pick(5, 1)]
    words += quick.pick(["--cot-tokens", 128, 384, 1024], ["--cot-tokens", 4, 8, "--hf-tokens", 4, "--frames", 4])
    found = json.loads(bench_latent_vs_cot.main(quick.arguments("latent_vs_cot", *words)).read_text())
    assert {"vlrt", "hf-bf16"} == {chain["engine"] for chain in found["results"][0]["chains"]}, found["absent"]


def test_peers(quick):
    words = ["--shape", quick.shape, "--threads", quick.threads, "--chain-tokens", 0, "--rounds", quick.pick(3, 1)]
    engines = quick.pick(["vlrt-int8", "hf-bf16"], ["vlrt-int8"])
    words += ["--frames", quick.pick(16, 4), "--engines", *engines, "openvino-int8"]
    words += ["--python-openvino", quick.python_openvino] if quick.python_openvino else []
    found = json.loads(bench_peers.main(quick.arguments("peers", *words)).read_text())
    assert set(engines) <= {row["engine"] for row in found["rows"]}, found["absent"]


def test_scaling(quick):
    words = ["--shape", quick.shape, "--threads", quick.threads, "--rounds", quick.pick(2, 1)]
    words += quick.pick(["--frames", 8, 16, 32, 64, 128], ["--frames", 4, 8, "--questions", 2, "--question-frames", 4])
    found = json.loads(bench_scaling.main(quick.arguments("scaling", *words)).read_text())
    assert found["exponents"]["total"] is not None


def test_cold(quick):
    words = ["--shapes", quick.shape, "--precisions", "int8", "--rounds", quick.pick(5, 1)]
    found = json.loads(bench_cold.main(quick.arguments("cold", *words)).read_text())
    assert found["rows"][0]["first_over_warm"]["median"] > 0


class Stages:
    """A bundle and 16 frames, stage by stage."""

    def __init__(self, shape, threads):
        bundle = Bundle.open(material.bundle(shape, "int8"))
        self.backend = select.load(bundle, threads=threads)
        model = self.backend.model
        frames = video.load(material.clip(), model.video, model.vision, num_frames=16)
        patches = preprocess.patchify(preprocess.resized(frames, model.video, model.vision), model.video, model.vision)
        media = [prompt.Media(False, patches.grid_thw, patches.seconds_per_temporal_patch)]
        self.built = prompt.build(prompt.Tokenizer.open(bundle.path), model, QUESTION, media, reasoning="direct")
        self.patches, self.tokens = patches, None

    def vision(self):
        self.tokens = self.backend.encode(self.patches.pixels, self.patches.grid_thw)
        return self.tokens

    def prefill(self):
        context = generate.read(self.backend, self.built, self.vision() if self.tokens is None else self.tokens)
        self.writer = generate.Writer(self.backend, context, 8)
        return self.writer.last_hidden

    def step(self):
        hidden = self.writer.feed_tokens([7])
        logits = self.backend.logits(hidden)
        self.writer.rewind(1)
        return logits


@pytest.fixture(scope="module")
def stages(quick):
    made = Stages(quick.shape, quick.threads)
    made.prefill()
    yield made
    made.backend.close()


@pytest.mark.parametrize("stage", ["vision", "prefill", "step"])
def test_stage(benchmark, stages, quick, stage):
    """A stage alone, by pytest-benchmark, for comparing two versions: `--benchmark-save`, `--benchmark-compare`."""
    out = benchmark.pedantic(getattr(stages, stage), rounds=quick.pick(5, 2), warmup_rounds=1)
    assert np.isfinite(out).all()


def test_report(quick):
    assert "## Targets" in report.write(quick.results).read_text()
