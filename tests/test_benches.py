"""The benches of the CPU, at tiny size, so that they do not rot. Figures are not tested; what is made of them is."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benches import bench_latent_vs_cot, bench_peers, bench_scaling, counts, report
from benches.engines import openvino_models
from benches.engines.client import Absent, Client
from benches.engines.protocol import Request
from tests.bundles import QUESTION, QUICK, square
from vlrt import bench, fresh

ROOT = Path(__file__).parent.parent
MODEL = {"overrides": QUICK}


def client(module, log, **settings):
    return Client(module, {**settings, "threads": 1}, threads=1, log=log)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("frames") / "frames.npy"
    np.save(path, square().data)
    return path


@pytest.fixture(scope="module")
def replies(make_bundle, make_checkpoint, source, tmp_path_factory):
    """What vlrt and transformers reply to the same requests."""
    logs = tmp_path_factory.mktemp("logs")
    engines = {
        "vlrt": ("vlrt_engine", {"bundle": str(make_bundle(**MODEL)), "num_latents": 6}),
        "hf": ("transformers_engine", {"checkpoint": str(make_checkpoint(**MODEL).path), "dtype": "float32"}),
    }
    found = {}
    for name, (module, settings) in engines.items():
        with client(module, logs / f"{name}.log", **settings) as engine:
            plain = Request(str(source), "", QUESTION, 5)
            found[name] = {
                "direct": engine.ask(plain),
                "shifted": engine.ask(Request(str(source), "", QUESTION, 5, shift=40)),
                "cot": engine.ask(Request(str(source), "", QUESTION, 9, reasoning="cot")),
                "described": engine.described,
            }
            engine.ask(Request(str(source), "", QUESTION, 1, logits_to=str(logs / f"{name}.npy")))
            found[name]["logits"] = np.load(logs / f"{name}.npy")
            if name == "vlrt":
                found[name]["latent"] = engine.ask(Request(str(source), "", QUESTION, 5, reasoning="latent"))
                found[name]["many"] = engine.ask(Request(str(source), "", QUESTION, 2, questions=3))
    return found


def test_engines_answer_the_same_question(replies):
    """Catches engines that are shown other frames, another prompt or other positions: their speed would not compare."""
    ours, theirs = replies["vlrt"], replies["hf"]
    for how in ("direct", "shifted", "cot"):
        assert ours[how]["token_ids"] == theirs[how]["token_ids"], how
    np.testing.assert_allclose(ours["logits"], theirs["logits"], atol=1e-3 * np.abs(theirs["logits"]).max())


def test_lengths_are_forced_and_latents_counted(replies):
    """Catches an answer that ends by itself, and the bundle's own four latents in place of those asked for."""
    assert [len(replies["hf"][how]["token_ids"]) for how in ("direct", "cot")] == [5, 9]
    assert replies["vlrt"]["latent"]["usage"]["latents"] == 6
    assert replies["vlrt"]["direct"]["usage"]["latents"] == 0
    assert replies["vlrt"]["latent"]["stages"]["latents"] > 0


def test_many_questions_are_timed_one_after_the_other(replies):
    after = replies["vlrt"]["many"]["after"]
    assert len(after) == 3
    assert 0 < replies["vlrt"]["many"]["opened"] < after[0] < after[1] < after[2]


def test_memory_and_weights_are_told(replies):
    """Catches a peak that is another process's: this one holds torch, which vlrt's must not."""
    assert 0 < replies["vlrt"]["direct"]["peak_host_memory_bytes"] < replies["hf"]["direct"]["peak_host_memory_bytes"]
    assert replies["vlrt"]["described"]["weight_bytes"] > 0


def test_an_engine_that_does_not_start_says_why(tmp_path):
    with pytest.raises(Absent, match=r"BundleError: .*nowhere"):
        client("vlrt_engine", tmp_path / "log", bundle=str(tmp_path / "nowhere.vlrt"))


def test_an_engine_that_fails_says_why(make_bundle, tmp_path):
    with (
        client("vlrt_engine", tmp_path / "log", bundle=str(make_bundle(**MODEL))) as engine,
        pytest.raises(Absent, match=r"nothing\.npy"),
    ):
        engine.ask(Request(str(tmp_path / "nothing.npy"), "", QUESTION, 1))


def test_an_engine_that_dies_is_absent(tmp_path):
    """Catches a wait for a process that has gone, and a reason that its log held."""
    with pytest.raises(Absent, match=r"status 1: .*No module named"):
        Client("vlrt_engine", {}, threads=1, log=tmp_path / "log", python=_isolated(tmp_path))


def _isolated(directory):
    """Return an interpreter that finds no bench."""
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -I -m benches_of_nobody "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_without_openvino_the_reason_names_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv(openvino_models.VARIABLE, str(tmp_path / "python"))
    with pytest.raises(Absent, match=r"is not there: run tools/setup-peers"):
        openvino_models.python(None, openvino_models.RUNS)
    with pytest.raises(Absent, match="lacks no_such_package"):
        openvino_models.python(sys.executable, "no_such_package.part")
    assert openvino_models.python(sys.executable, "json.decoder") == sys.executable


def test_agreement_ends_where_tokens_part():
    assert bench_peers.agreement([([1, 2, 3, 4], [1, 2, 9, 4]), ([1, 2, 3, 4], [1, 2, 3, 4])]) == 6 / 8
    assert bench_peers.agreement([([9, 2], [1, 2])]) == 0


def test_the_exponent_is_that_of_the_power():
    assert bench_scaling.exponent([(n, 3 * n**1.5) for n in (8, 16, 64)]) == pytest.approx(1.5)
    assert bench_scaling.exponent([(8, 1.0), (16, 0.0)]) is None


def test_ratios_are_those_of_the_definition():
    """Catches a ratio upside down, and an overhead that counts what answering directly takes."""
    samples = {
        ("vlrt", "direct", 0): [{"seconds": s, "stages": {"latents": 0.0}} for s in (1.0, 1.2)],
        ("vlrt", "latent", 0): [{"seconds": s, "stages": {"latents": 0.4}} for s in (1.5, 1.7)],
        ("vlrt", "cot", 384): [{"seconds": 21.1, "stages": {"latents": 0.0}}],
        ("hf-bf16", "direct", 0): [{"seconds": 3.0}],
        ("hf-bf16", "cot", 384): [{"seconds": 64.0}],
    }
    found = bench_latent_vs_cot.ratios(samples)
    ours, theirs = found["chains"]
    assert found["latent_overhead_seconds"] == pytest.approx(0.5)
    assert ours["overhead_ratio"] == pytest.approx(20.0 / 0.5)
    assert ours["overhead_ratio_to_stage"] == pytest.approx(20.0 / 0.4)
    assert theirs["end_to_end_ratio"] == pytest.approx(64.0 / 1.6)
    assert ours["overhead_ratio_to_parallel"] is None
    samples[(bench_latent_vs_cot.PARALLEL, "latent", 0)] = [{"seconds": s} for s in (1.1, 1.3)]
    assert bench_latent_vs_cot.ratios(samples)["chains"][0]["overhead_ratio_to_parallel"] == pytest.approx(20.0 / 0.1)
    for reply in samples[("vlrt", "latent", 0)]:
        reply["seconds"] = 1.0
    assert bench_latent_vs_cot.ratios(samples)["chains"][0]["overhead_ratio"] is None


def test_bytes_of_a_step_are_those_of_the_stored_weights():
    """Catches a head that is counted in another precision than it is stored in."""
    model = fresh.fresh_model("small")
    head = model.decoder.vocab_size * model.decoder.hidden_size
    linear = counts.linear_parameters(model.decoder)
    needed = counts.step_bytes(model.decoder, 10, weight_bytes=1, head_bytes=1, value_bytes=4, with_head=True)
    assert needed == {"weights": linear + head, "cache": 2 * 24 * 2 * 64 * 10 * 4}
    assert counts.step_bytes(model.decoder, 0, weight_bytes=0.5)["weights"] == linear // 2
    size = counts.activation_bytes(model, 1024, 603, vision_chunk=4096, prefill_chunk=512)
    assert size == 4 * 512 * model.decoder.intermediate_size


def test_the_quick_set_runs(make_bundle, make_checkpoint, tmp_path):
    """Catches a bench, an option or a result that no longer fits the others: all of `pytest benches/`, in no size."""
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny").symlink_to(make_checkpoint(**MODEL).path)
    (cache / "tiny-int8.vlrt").symlink_to(make_bundle("int8", **MODEL))
    bench.write_clip(cache / "clip-40s-8fps-224.mp4", seconds=3, size=112)
    words = ["--shape", "tiny", "--engine-threads", "1", "--results", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    own |= {"VLRT_BENCH_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    own |= {openvino_models.VARIABLE: str(tmp_path / "none")}
    command = [sys.executable, "-m", "pytest", "benches/", *words]
    run = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    text = (tmp_path / "report.md").read_text()
    assert "Absent: openvino-int8" in text
    assert "Not measured." not in text
    assert {path.stem for path in tmp_path.glob("*.json")} == set(report.BENCHES)
