"""Cold start: from a new process to the first answer, and how that divides into import, load and answer.

    python -m benches.bench_cold [--shapes tiny small] [--precisions fp32 int8] [--rounds 5]

Each round starts a new Python process per bundle, in turn. Files are in the system's cache, as they are after a first
use; what is measured is the work, not the disk. The answer is to 16 frames, with latents, 4 tokens. The same process
then answers again, three times: the warm time beside which the first one is set.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benches import machine, material
from benches.bench_stages import ANSWER_TOKENS, QUESTION
from vlrt.quantiles import quantiles

PARTS = ("start", "import", "load", "answer", "total", "warm")
PROGRAM = f"""
import json, statistics, sys, time
begun = time.time()
import vlrt
runtime_class = vlrt.Runtime
imported = time.time()
runtime = runtime_class.open(sys.argv[1], video_cache_bytes=0)
loaded = time.time()
def ask():
    return runtime.ask(
        sys.argv[2], {QUESTION!r}, num_frames=16, max_tokens={ANSWER_TOKENS}, min_tokens={ANSWER_TOKENS}
    )
answer = ask()
done = time.time()
warm = statistics.median(ask().timings["total"] for _ in range(3))
print(json.dumps([begun, imported, loaded, done, warm, len(answer.token_ids)]))
"""


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print a table, write JSON; return its path."""
    parser = argparse.ArgumentParser(prog="benches.bench_cold", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    given = list(argv if argv is not None else sys.argv[1:])
    args = parser.parse_args(given)
    bundles = {(shape, p): material.bundle(shape, p) for shape in args.shapes for p in args.precisions}
    clip = material.clip()
    samples: dict[tuple[str, str], list[dict[str, float]]] = {key: [] for key in bundles}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=(args.rounds + 1) * len(bundles))
        for i in range(args.rounds + 1):  # the first round fills the system's cache
            for key, path in bundles.items():
                sample = _start(path, clip)
                if i:
                    samples[key].append(sample)
                progress.advance(task)
    rows = [
        {
            "shape": shape,
            "precision": precision,
            "rounds": args.rounds,
            "seconds": {part: quantiles([sample[part] for sample in found]) for part in PARTS},
            "first_over_warm": quantiles([(sample["load"] + sample["answer"]) / sample["warm"] for sample in found]),
        }
        for (shape, precision), found in samples.items()
    ]
    out = machine.write_result("cold", given, args.out, rows=rows)
    table = Table(title="seconds of a cold start (medians)")
    for name in ("shape", "precision", *PARTS, "open to first answer / warm"):
        table.add_column(name, justify="left" if name in ("shape", "precision") else "right")
    for row in rows:
        seconds = [f"{row['seconds'][part]['median']:.3f}" for part in PARTS]
        table.add_row(row["shape"], row["precision"], *seconds, f"{row['first_over_warm']['median']:.2f}")
    Console(width=120).print(table)
    print(out)
    return out


def _start(bundle: Path, clip: Path) -> dict[str, float]:
    """Run one process; return the seconds of each part."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(bundle), str(clip)], capture_output=True, text=True, check=True
    )
    begun, imported, loaded, answered, warm, count = json.loads(done.stdout)
    assert count == ANSWER_TOKENS, "the answer has another length"
    parts = (begun - start, imported - begun, loaded - imported, answered - loaded, answered - start, warm)
    return dict(zip(PARTS, parts, strict=True))


if __name__ == "__main__":
    main()
