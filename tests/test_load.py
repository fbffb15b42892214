"""Load and leaks, in processes of their own: a short version always, minutes with `pytest --soak`."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import load
from tests.bundles import QUICK

MODEL = {"overrides": {**QUICK, "decoder.max_positions": 2048}}
MIB = 2**20


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    directory = tmp_path_factory.mktemp("videos")
    load.write_videos(directory)
    return directory


def run(bundle: Path, videos: Path, *arguments: str) -> dict[str, Any]:
    """Run tests/load.py; its memory stays out of this process and what this one has out of its."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "tests.load", str(bundle), str(videos), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    assert result["num_wrong"] == 0, result["wrong"]
    assert result["threads_left"] == []
    assert result["files_left"] == 0
    return result


@pytest.mark.parametrize("seconds", [6, pytest.param(240, marks=pytest.mark.soak)], ids=["short", "minutes"])
def test_sixteen_threads_of_everything(make_bundle, videos, seconds):
    """Catches answers of another thread's question, errors that nobody raised, memory that grows, threads that stay."""
    result = run(make_bundle(**MODEL), videos, "--seconds", str(seconds))
    assert {"ask", "clip", "ask_many", "asyncio", "busy", "stream left", "broken: VideoError"} <= set(result["counts"])
    memory = result["rss_bytes"]
    third = len(memory) // 3
    if seconds > 100:
        growth = statistics.median(memory[2 * third :]) - statistics.median(memory[third : 2 * third])
        sys.stderr.write(json.dumps({"growth_mib": growth / MIB, "rss_mib": memory[-1] / MIB, **result["counts"]}))
        assert growth < 16 * MIB


@pytest.mark.parametrize("num_asks", [120, pytest.param(1000, marks=pytest.mark.soak)], ids=["short", "long"])
def test_memory_is_flat_over_many_questions(make_bundle, videos, num_asks):
    """Catches what each question leaves behind: a cache, a decoder, a file. One that leaves 100 KB each time shows."""
    result = run(make_bundle(**MODEL), videos, "--asks", str(num_asks))
    used = result["allocated_bytes"]
    growth = max(used[-3:]) - max(used[1:4])  # caches have filled by then
    sys.stderr.write(json.dumps({"growth_mib": growth / MIB, "rss_mib": [m // MIB for m in result["rss_bytes"]]}))
    assert growth < 6 * MIB
