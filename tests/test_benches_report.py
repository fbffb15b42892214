"""The report of the CPU's benches: what targets, tables and plots are made of, which is results' JSON alone."""

import json
import math
from pathlib import Path

import pytest

from benches import machine, report, targets

ROOT = Path(__file__).parent.parent
MACHINE = {
    "cpu": {"model": "made up", "usable_cores": 2},
    "memory_bytes": {"total": 8_000_000_000, "available": 1},
    "versions": {"vlrt": "1"},
    "commit": "abc",
    "load_average": [0.0, 0.0, 0.0],
}


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
                "overhead_ratio_to_parallel": 120.0,
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
        "latent_vs_cot": {**common, "num_latents": 8, "parallel_rounds": 2, "answer_tokens": 4, "results": [latent]},
        "scaling": {
            **common,
            "frames": rows,
            "questions": [{"questions": 1, "seconds": 1.0}, {"questions": 2, "seconds": 1.1}],
            "question_frames": 16,
            "exponents": dict.fromkeys((*STAGES, "questions"), 1.0),
        },
        "cold": {**common, "rows": [{**cold, **seconds(2.5, "first_over_warm")}]},
    }


REACHED = [0.5, 0.5, 0.6, 0.7, 0.6, 0.6, 99.0, 120.0, 41.0, 2.5, 1.2]
MET = [True, False, True, True, False, False, False, True, True, True, True]


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
