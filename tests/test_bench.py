"""`vlrt bench`: what it counts, and what its report says. How long things take is not tested."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bundles import QUICK, square
from vlrt import bench
from vlrt.errors import ConfigError
from vlrt.quantiles import quantiles
from vlrt.runtime import Runtime

MODEL = {"overrides": QUICK}


@pytest.fixture(scope="module")
def result(make_bundle):
    plan = bench.Plan(num_frames=4, chain_tokens=(6, 12), answer_tokens=2, rounds=3, chain_rounds=2)
    with Runtime.open(make_bundle(**MODEL), video_cache_bytes=0) as runtime:
        seen = []
        return bench.run(runtime, square(), plan, progress=lambda *now: seen.append(now)), seen


def test_every_case_is_asked_as_often_as_it_should_be(result):
    """Catches a warm-up round that is counted, and lengths that are not forced."""
    found, seen = result
    rounds = {case.name: len(stages["total"]) for case, stages in found.seconds.items()}
    assert rounds == {"direct": 3, "latent": 3, "chain of 6": 2, "chain of 12": 2}
    lengths = {case.name: answer.usage.answer_tokens for case, answer in found.answers.items()}
    assert lengths == {"direct": 2, "latent": 2, "chain of 6": 8, "chain of 12": 14}
    assert [done for done, _, _ in seen] == list(range(seen[0][1]))
    assert all(answer.usage.reused_tokens == 0 for answer in found.answers.values())


def test_ratios_are_those_of_the_seconds(result):
    """Catches a ratio upside down, and reasoning that counts the answer."""
    found, _ = result
    rows = {row["case"]: row for row in found.to_dict()}
    chain, latent, direct = rows["chain of 12"], rows["latent"], rows["direct"]

    def median(row, stage="total"):
        return row["seconds"][stage]["median"]

    assert chain["end_to_end_ratio"] == pytest.approx(median(chain) / median(latent))
    written = median(chain, "answer") - median(direct, "answer")
    assert chain["reasoning_ratio"] == pytest.approx(written / median(latent, "latents"))
    assert "end_to_end_ratio" not in direct
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()


def test_a_model_without_latents_is_timed_without_ratios(make_bundle):
    """Catches a report that takes latents for granted."""
    with Runtime.open(make_bundle(**MODEL, latent=None), video_cache_bytes=0) as runtime:
        found = bench.run(runtime, square(), bench.Plan(4, (2,), 1, 1))
    assert [row["case"] for row in found.to_dict()] == ["direct", "chain of 2"]
    assert "end_to_end_ratio" not in found.to_dict()[1]
    assert "| chain of 2 |" in bench.markdown(found.to_dict(), {"machine": "this"})


def test_a_short_clip_is_sampled_as_the_bundle_does(make_bundle):
    """Catches 16 frames asked of a clip that has fewer."""
    with Runtime.open(make_bundle(**MODEL), threads=1, video_cache_bytes=0) as runtime:
        found = bench.run(runtime, square(count=6), bench.Plan(None, (2,), 1, 1))
    assert {row["usage"]["num_frames"] for row in found.to_dict()} == {6}


def test_quantiles():
    assert quantiles([5, 1, 4, 2, 3]) == {"median": 3, "p20": 2, "p80": 4}


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"chain_tokens": (0,)}, {"rounds": 1, "chain_rounds": 2}])
def test_what_cannot_be_measured_is_refused(wrong):
    with pytest.raises(ConfigError, match="cannot be measured"):
        bench.Plan(**wrong)


def test_the_command_writes_a_report(make_bundle, tmp_path):
    """Catches a command that no longer fits the bench, and a report without its numbers."""
    command = [sys.executable, "-m", "vlrt", "bench", str(make_bundle(**MODEL)), "--rounds", "1"]
    command += ["--num-frames", "2", "--threads", "1", "--cot-tokens", "4", "-o", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "out" / "report.md").read_text() + "\n"
    assert "| chain of 4 |" in done.stdout
    assert len(json.loads((tmp_path / "out" / "bench.json").read_text())["rows"]) == 3
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"report.md", "bench.json"}


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    """Catches half a report, or one beside the numbers of another run."""
    bench.save(tmp_path, "old", {"number": 1})
    write = Path.write_text

    def full(path, text, **rest):
        if "json" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, text, **rest)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"No space left on device; choose another -o"):
        bench.save(tmp_path, "new", {"number": 2})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "report.md": "old",
        "bench.json": '{\n "number": 1\n}\n',
    }
