"""What an export takes: seconds and peak memory, per shape and precision.

    python -m benches.bench_export [--shapes 3b] [--precisions fp32 int8]

Two peaks are reported: all resident memory, in which the pages of the memory-mapped checkpoint count although the
system may drop them at will, and anonymous memory, which it cannot.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benches import machine, material
from vlrt.bundle import Bundle


def main(argv: Sequence[str] | None = None) -> None:
    """Export each, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_export", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", default=["3b"])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = []
    for shape in args.shapes:
        checkpoint = material.checkpoint(shape)
        for precision in args.precisions:
            rows.append(_measure(checkpoint, precision))
            Console(stderr=True).print(rows[-1])
    out = machine.write_result("export", argv if argv is not None else sys.argv[1:], args.out, rows=rows)
    Console(width=140).print(_table(rows))
    print(out)


def _measure(checkpoint: Path, precision: str) -> dict[str, Any]:
    """Run `vlrt export` in a process of its own and watch its memory."""
    out = checkpoint.with_name(f"{checkpoint.name}-{precision}.vlrt")
    command = [sys.executable, "-m", "vlrt", "export", str(checkpoint), "-o", str(out), "--precision", precision]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    status, anonymous, resident = Path(f"/proc/{process.pid}/status"), 0, 0
    while process.poll() is None:
        sample = _kilobytes(status)
        anonymous = max(anonymous, sample.get("RssAnon", 0))
        resident = max(resident, sample.get("VmHWM", 0))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed with exit code {process.returncode}")
    bundle = Bundle.open(out)
    return {
        "shape": checkpoint.name,
        "precision": precision,
        "seconds": time.perf_counter() - start,
        "checkpoint_bytes": sum(f.stat().st_size for f in checkpoint.glob("*.safetensors")),
        "bundle_bytes": bundle.num_bytes,
        "peak_anonymous_bytes": anonymous * 1024,
        "peak_resident_bytes": resident * 1024,
        "parity": [vars(row) for row in bundle.parity],
    }


def _kilobytes(status: Path) -> dict[str, int]:
    try:
        lines = status.read_text(encoding="utf-8").splitlines()
    except OSError:  # it has just ended
        return {}
    return {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "kB" in rest}


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="exports, the parity gate included")
    for name in (
        "shape",
        "precision",
        "seconds",
        "checkpoint GB",
        "bundle GB",
        "peak anonymous GB",
        "peak resident GB",
    ):
        table.add_column(name, justify="right")
    for row in rows:
        sizes = ("checkpoint_bytes", "bundle_bytes", "peak_anonymous_bytes", "peak_resident_bytes")
        table.add_row(
            row["shape"], row["precision"], f"{row['seconds']:.0f}", *(f"{row[size] / 1e9:.2f}" for size in sizes)
        )
    return table


if __name__ == "__main__":
    main()
