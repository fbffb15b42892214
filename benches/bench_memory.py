"""Predicted against measured peak memory of one question, over numbers of frames, each in a process of its own.

    python -m benches.bench_memory [--shape small] [--precision int8] [--frames 16 64 256] [--rounds 3]

Measured: the most anonymous memory (RssAnon, looked at every millisecond) from the loaded bundle to the answer, less
what there was before the question, with PyAV imported. Weights that are mapped become resident when they are first
read; they are the bundle's, and can be dropped. The answer is forced to 4 tokens after latents: the weights are
untrained. Linux alone.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benches import machine, material
from vlrt.memory_plan import MIB

QUESTION = "What moves first, and which way does it go?"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_memory", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    bundle, clip = material.bundle(args.shape, args.precision), material.clip()
    cases = [frames for _ in range(args.rounds) for frames in args.frames]
    found: dict[int, list[dict[str, Any]]] = {frames: [] for frames in args.frames}
    for frames in track(cases, "processes", console=Console(stderr=True)):
        given = json.dumps([str(bundle), str(clip), frames, args.threads])
        ran = subprocess.run(
            [sys.executable, "-m", "benches.bench_memory", "--measure", given], stdout=subprocess.PIPE, check=True
        )
        found[frames].append(json.loads(ran.stdout))
    rows = [_row(samples) for samples in found.values()]
    out = machine.write_result(
        "memory",
        argv if argv is not None else sys.argv[1:],
        args.out,
        shape=args.shape,
        precision=args.precision,
        rounds=args.rounds,
        rows=rows,
    )
    Console(width=140).print(_table(rows))
    print(out)


def measure(bundle: str, clip: str, frames: int, threads: int | None) -> dict[str, Any]:
    """Ask one question in this process; return what it was predicted to take, and what it took."""
    import av  # noqa: F401  # its pages are no part of a question

    import vlrt
    from vlrt import host_memory, memory_plan

    plans: list[memory_plan.Plan] = []
    with vlrt.Runtime.open(bundle, threads=threads, video_cache_bytes=0) as runtime:
        backend = runtime._open_backend()
        predict = backend.plan_memory

        def keep(shape: memory_plan.Shape) -> memory_plan.Plan | None:
            plan = predict(shape)
            assert plan is not None, "memory is predicted for bundles of ort"
            plans.append(plan)
            return plan

        object.__setattr__(runtime._admission, "plan", keep)
        host_memory.give_back()  # what loading left behind
        before = _status("RssAnon")
        sampler = _Sampler()
        answer = runtime.ask(clip, QUESTION, num_frames=frames, max_tokens=4, min_tokens=4)
        peak = sampler.end() - before
    (plan,) = plans
    return {
        "num_frames": frames,
        "video_tokens": answer.usage.video_tokens,
        "loaded_bytes": before,
        "measured_bytes": peak,
        "predicted_bytes": plan.peak_bytes,
        "cache_bytes": plan.cache,
        "largest_activation_bytes": plan.largest_activation,
        "seconds": answer.timings["total"],
    }


class _Sampler(threading.Thread):
    """Looks at RssAnon every millisecond until `end`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most, self._over = 0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.001):
            self._most = max(self._most, _status("RssAnon"))

    def end(self) -> int:
        """Return the most bytes that were seen."""
        self._over.set()
        self.join()
        return self._most


def _row(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of a case, and ratios: the prediction's, and that to cache and largest activation."""
    row = {name: statistics.median(sample[name] for sample in samples) for name in samples[0]}
    row["measured_bytes_of_rounds"] = [sample["measured_bytes"] for sample in samples]
    row["predicted_over_measured"] = row["predicted_bytes"] / row["measured_bytes"]
    row["times_cache_and_activation"] = row["measured_bytes"] / (row["cache_bytes"] + row["largest_activation_bytes"])
    return row


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="peak memory above the loaded bundle, MiB")
    names = ("frames", "video tokens", "predicted", "measured", "ratio", "cache", "largest pass", "x (cache + pass)")
    for name in names:
        table.add_column(name, justify="right")
    for row in rows:
        sizes = [f"{row[name] / MIB:.0f}" for name in ("predicted_bytes", "measured_bytes")]
        parts = [f"{row[name] / MIB:.0f}" for name in ("cache_bytes", "largest_activation_bytes")]
        ratio, times = f"{row['predicted_over_measured']:.3f}", f"{row['times_cache_and_activation']:.2f}"
        table.add_row(str(row["num_frames"]), str(row["video_tokens"]), *sizes, ratio, *parts, times)
    return table


def _status(name: str) -> int:
    rows = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{name}:"))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main()
