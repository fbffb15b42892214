"""Checks, kernels, stages and answers on a GPU, in one call of a few minutes: python -m benches.gpu --out DIR.

Needs torch, triton, transformers, numpy, safetensors and onnxruntime, and runs from the source tree. Every phase is
written to DIR as soon as it ends; last comes a table of targets. `--tiny` runs the same on a CPU in tiny sizes, the
kernels interpreted: its figures mean nothing, but what would break on the card breaks there.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import vlrt
from benches.gpu import parts, targets
from benches.gpu.phases import NAMES
from benches.gpu.suite import ROOT, Suite

if not (ROOT / "vlrt" / "kernels").is_dir():  # a copy without symbolic links: see setup.py
    vlrt.__path__.append(str(ROOT))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the suite, print the table, write DIR/results.json; return 1 where a phase was not run to its end."""
    parser = argparse.ArgumentParser(prog="benches.gpu", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--minutes", type=float, help="of everything (7.5; on the CPU 60: a trial ends sooner)")
    parser.add_argument("--phases", nargs="+", choices=NAMES, help="these alone")
    parser.add_argument("--tune", action="store_true", help="search block sizes; configs/*.json go to DIR")
    parser.add_argument("--device", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny sizes; without a GPU, on the CPU")
    args = parser.parse_args(argv)
    device = args.device or _device()
    if device == "cpu" and not args.tiny:
        parser.error("there is no GPU that PyTorch can use; --tiny makes a trial run on the CPU")
    phases = args.phases or [name for name in NAMES if name != "tune" or args.tune or args.tiny]
    for name in phases:
        shutil.rmtree(args.out / "parts" / name, ignore_errors=True)
    begun = datetime.now(UTC).isoformat(timespec="seconds")
    minutes = args.minutes or (7.5 if device == "cuda" else 60.0)
    Suite(args.out.resolve(), device, args.tiny, minutes * 60, phases).run()
    found = parts.read(args.out)
    rows = targets.rows(found)
    result = {"bench": "gpu", "date": begun, "device": device, "tiny": args.tiny, "targets": rows, "phases": found}
    (args.out / "results.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if args.tiny:
        print("trial run in tiny sizes: the figures mean nothing")
    print(targets.table(rows, found))
    print(args.out / "results.json")
    return int(any("result" not in part for name in phases for part in found.get(name, {}).values()))


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    raise SystemExit(main())
