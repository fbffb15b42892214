"""The benches of the CPU, at tiny size, so that they do not rot. Figures are not tested; what is made of them is."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benches import bench_latent_vs_cot, bench_peers, bench_scaling, counts, machine, report, targets
from benches.engines import openvino_models
from benches.engines.client import Absent, Client
from benches.engines.protocol import Request
from tests.bundles import QUESTION, QUICK, square
from vlrt import bench, fresh

ROOT = Path(__file__).parent.parent
MODEL = {"overrides": QUICK}
MACHINE = {
    "cpu": {"model": "made up", "usable_cores": 2},
    "memory_bytes": {"total": 8_000_000_000, "available": 1},
    "versions": {"vlrt": "1"},
    "commit": "abc",
    "load_average": [0.0, 0.0, 0.0],
}


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


# ---- the report ----


def seconds(value, *names):
    return {name: {"median": value, "p20": value, "p80": value} for name in names}


STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer", "total")
USAGE = {"peak_host_memory_bytes": 1_000_000}


def results():
    """Made-up results of every bench, at the shape that the targets speak of."""
    common = {"date": "2026-01-02T03:04:05+00:00", "command": "python -m benches.it", "machine": MACHINE}
    common |= {"shape": "small", "precision": "int8", "threads": 2, "absent": {"openvino-int4": "not\ninstalled"}}
    peers = [
        ("hf-fp32", "fp32", 16, 5.0),
        ("vlrt-fp32", "fp32", 16, 3.0),
        ("openvino-int8", "int8", 16, 2.0),
        ("vlrt-int8", "int8", 16, 1.0),
        ("openvino-int8", "int8", 64, 10.0),
        ("vlrt-int8", "int8", 64, 5.0),
    ]
    limits = [
        {
            "num_frames": count,
            "prompt_tokens": 603,
            "rounds": 5,
            "flops": {"vision": 1e11, "prefill": 4e11},
            "seconds": seconds(1.0, "vision", "prefill", "answer", "vision_and_prefill"),
            "flops_per_second": {"vision": 1e11, "prefill": 4e11, "vision_and_prefill": 2.5e11},
            "share_of_gemm": {"fp32": 0.9, "bf16": 0.8, "int8": 0.7},
            "step_seconds": 0.02,
            "step_bytes": {"weights": 1, "cache": 1},
            "step_share_of_read": 0.6,
            "memory_bytes": {"peak": 10**9},
            "peak_over_need": 1.2,
        }
        for count in (16, 64)
    ]
    gemm = {dtype: {"best": 1e12, "by": "torch"} for dtype in ("fp32", "bf16", "int8")}
    cases = [("vlrt", "direct", 0), ("vlrt", "latent", 0), ("vlrt", "cot", 384), ("hf-bf16", "cot", 384)]
    latent = {
        "num_frames": 16,
        "rows": [
            {
                "engine": engine,
                "case": how,
                "reasoning": how,
                "chain_tokens": chain,
                "rounds": 5,
                "seconds": seconds(1.0 + chain, "total"),
            }
            for engine, how, chain in cases
        ],
        "chains": [
            {
                "engine": engine,
                "chain_tokens": 384,
                "end_to_end_ratio": 41.0,
                "overhead_ratio": 99.0,
                "overhead_ratio_to_stage": 98.0,
            }
            for engine in ("vlrt", "hf-bf16")
        ],
    }
    rows = [
        {"num_frames": count, "rounds": 3, "seconds": seconds(0.01 * count, *STAGES), "usage": USAGE}
        for count in (8, 16, 64)
    ]
    cold = {"shape": "small", "precision": "int8", "rounds": 5, "seconds": seconds(1.0, "load", "answer", "warm")}
    return {
        "peers": {
            **common,
            "answer_tokens": 6,
            "chain_tokens": 300,
            "reference": "hf-fp32",
            "rows": [
                {
                    "engine": engine,
                    "precision": precision,
                    "num_frames": count,
                    "rounds": 5,
                    "seconds": seconds(took, "answer", "first_token"),
                    "peak_host_memory_bytes": 10**9,
                    "answer_agreement": 0.9,
                }
                for engine, precision, count, took in peers
            ],
        },
        "limits": {**common, "ceilings": {"gemm": gemm, "memory": {"read": 3e10, "by": "sum", "copy": 2e10}}}
        | {"rows": limits},
        "latent_vs_cot": {**common, "num_latents": 8, "answer_tokens": 4, "results": [latent]},
        "scaling": {
            **common,
            "frames": rows,
            "questions": [{"questions": 1, "seconds": 1.0}, {"questions": 2, "seconds": 1.1}],
            "question_frames": 16,
            "exponents": dict.fromkeys((*STAGES, "questions"), 1.0),
        },
        "cold": {**common, "rows": [{**cold, **seconds(2.5, "first_over_warm")}]},
    }


REACHED = [0.5, 0.5, 0.6, 0.7, 0.6, 0.6, 99.0, 41.0, 2.5, 1.2]
MET = [True, False, True, True, False, False, False, True, True, True]


def test_targets_are_read_from_the_results():
    """Catches a ratio upside down, a target met by the wrong side, and a name that no result has."""
    rows = targets.rows(results())
    assert [row["reached"] for row in rows] == pytest.approx(REACHED)
    assert [row["met"] for row in rows] == MET


@pytest.mark.parametrize("name", report.BENCHES)
def test_what_is_absent_is_not_measured(name):
    """Catches a figure from somewhere else than the result that is named, and a crash for want of one."""
    found = results()
    del found[name]
    for row in targets.rows(found):
        assert (row["reached"] is None) == (row["bench"] == name)
    assert "Not measured." in report.markdown(found, {})


def test_other_shapes_reach_no_target():
    found = {name: {**result, "shape": "tiny"} for name, result in results().items() if name != "cold"}
    assert {row["met"] for row in targets.rows(found)} == {None}


def test_the_report_is_made_of_the_files_alone(tmp_path):
    """Catches a plot that does not draw, a table whose rows have other cells than its head, and a lost reason."""
    for name, result in results().items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    text = report.write(tmp_path).read_text()
    for drawn in ("stages", "latents_vs_chain", "peers", "limits", "scaling", "questions"):
        assert f"({drawn}.png)" in text
        assert (tmp_path / f"{drawn}.png").stat().st_size > 1000
    assert "Absent: openvino-int4: not installed" in text
    for block in text.split("\n\n"):
        cells = {line.count("|") for line in block.splitlines() if line.startswith("|")}
        assert len(cells) <= 1, block
    assert text.count("| met |") == sum(MET)
    assert text.count("**not met**") == len(MET) - sum(MET)


def test_a_directory_without_results_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"holds none of peers\.json"):
        report.write(tmp_path)


def test_committed_results_still_make_reports():
    """Catches a change of a result's form that leaves the committed ones behind."""
    for directory in (ROOT / "benches" / "results").iterdir():
        if any((directory / f"{name}.json").is_file() for name in report.BENCHES):
            assert report.markdown(report.read(directory), {}).startswith("# What vlrt reaches")


def test_results_know_their_machine(tmp_path):
    path = machine.write_result("peers", ["--out", "somewhere", "--rounds", "1"], tmp_path / "peers.json", rows=[])
    result = json.loads(path.read_text())
    assert result["command"] == "python -m benches.bench_peers --rounds 1"
    assert math.isfinite(result["machine"]["load_average"][0])
