"""A 1080p frame to a size that a tower takes: libvlrt_ort beside Pillow, in turn, on one thread.

    python -m benches.bench_resize [--rounds 15]

Both are compared before they are timed.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benches import machine
from vlrt import resampling
from vlrt.backends import ort_library
from vlrt.quantiles import quantiles

SOURCE = (1080, 1920)
SIZES = ((252, 448), (560, 1008))  # 144 and 720 video tokens per two frames


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_resize", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    library = ort_library.find()
    if isinstance(library, str):
        raise SystemExit(library)
    frame = np.random.default_rng(0).integers(0, 256, (*SOURCE, 3), np.uint8)
    calls = {"library": resampling.resize, "pillow": resampling._by_pillow}
    rows = []
    for size in SIZES:
        apart = np.abs(np.subtract(*(call(frame, size).astype(int) for call in calls.values())))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(args.rounds):
            for name, call in calls.items():
                start = time.perf_counter()
                call(frame, size)
                seconds[name].append(time.perf_counter() - start)
        found = {name: quantiles(times) for name, times in seconds.items()}
        rows.append(
            {
                "size": size,
                "seconds": found,
                "speedup": found["pillow"]["median"] / found["library"]["median"],
                "largest_difference": int(apart.max()),
                "share_that_differs": float((apart > 0).mean()),
            }
        )
    given = argv if argv is not None else sys.argv[1:]
    out = machine.write_result("resize", given, args.out, source=SOURCE, rounds=args.rounds, rows=rows)
    table = Table(title="a frame of 1920 x 1080 pixels")
    for column in ("to", "library ms", "Pillow ms", "speedup", "differ by 1"):
        table.add_column(column, justify="right")
    for row in rows:
        times = (f"{row['seconds'][name]['median'] * 1e3:.1f}" for name in calls)
        height, width = row["size"]
        table.add_row(f"{width} x {height}", *times, f"{row['speedup']:.1f}", f"{row['share_that_differs']:.1e}")
    Console(width=100).print(table)
    print(out)


if __name__ == "__main__":
    main()
