"""Runs items, each guarded, in a process that may die: `suite.py` starts it and reads what it wrote."""

import argparse
import importlib
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from benches import interpreter
from benches.gpu import parts

LOST_DEVICE = 3  # exit status: a kernel has broken this process's context, which only a new process mends


def main(argv: Sequence[str] | None = None) -> None:
    """Run the items that are given as phase/item, until time is up."""
    parser = argparse.ArgumentParser(prog="benches.gpu.worker")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("specs", nargs="+")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if args.device == "cpu":
        interpreter.start()
    for spec in args.specs:
        phase, _, item = spec.partition("/")
        begun = time.monotonic()
        if begun > deadline:
            parts.write(args.out, phase, item, skipped="out of time", seconds=0.0)
            continue
        found = _guarded(phase, item, args, deadline)
        try:
            parts.write(args.out, phase, item, **found, seconds=time.monotonic() - begun)
        except (TypeError, ValueError) as error:  # no JSON: NaN, or a tensor
            parts.write(args.out, phase, item, error=f"{error}: {found}", seconds=time.monotonic() - begun)
        if _device_is_lost(args.device):
            sys.exit(LOST_DEVICE)


def _guarded(phase: str, item: str, args: argparse.Namespace, deadline: float) -> dict[str, object]:
    try:
        from benches.inputs import Setting

        module = importlib.import_module(f"benches.gpu.{phase}")
        setting = Setting(args.device, args.tiny)
        return {"result": module.run(item, setting, lambda: time.monotonic() > deadline, args.out)}
    except Exception:
        return {"error": traceback.format_exc()}


def _device_is_lost(device: str) -> bool:
    from benches import timing

    return timing.device_is_lost(device)


if __name__ == "__main__":
    main()
