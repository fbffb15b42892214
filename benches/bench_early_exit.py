"""Latents that stop once a choice is certain: accuracy and time of the trained demo model by the probability asked for.

    python -m benches.bench_early_exit [--clips 100] [--limits 0.5 0.8 0.9 0.95 0.99 0.999]

Measured at temperature 1, and at the temperature that fits clips of the validation split, where one does.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vlrt
from benches import demo_model, machine
from vlrt import calibration
from vlrt.errors import ConfigError
from vlrt.train.triplets import Triplet


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_early_exit", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows, validation = demo_model.questions(args.clips), demo_model.questions(args.clips, "validation")
    with vlrt.Runtime.open(demo_model.bundle(), threads=args.threads, video_cache_bytes=0) as runtime:
        runtime.model = dataclasses.replace(runtime.model, choice_temperature=1.0)
        curves = {"1": _curve(runtime, rows, args.limits)}
        temperature: float | str
        try:
            temperature = _fitted(runtime, validation)
            runtime.model = dataclasses.replace(runtime.model, choice_temperature=temperature)
            curves[f"{temperature:.3f}"] = _curve(runtime, rows, args.limits)
        except ConfigError as error:
            temperature = str(error)
    out = machine.write_result(
        "early_exit", argv if argv is not None else sys.argv[1:], args.out, temperature=temperature, curves=curves
    )
    for name, curve in curves.items():
        print(f"temperature {name}\n{'until':>10} {'accuracy':>9} {'latents':>8} {'calibration error':>18} {'ms':>7}")
        for way, row in curve.items():
            took = 1e3 * (row["seconds"]["latents"]["median"] + row["seconds"]["answer"]["median"])
            error = row["calibration_error"]
            print(f"{way:>10} {row['accuracy']:9.3f} {row['latents']:8.2f} {error:18.3f} {took:7.2f}")
    print(f"fitted temperature: {temperature}\n{out}")


def _curve(runtime: vlrt.Runtime, rows: list[Triplet], limits: Sequence[float]) -> dict[str, Any]:
    ways: dict[str, Any] = {"all": lambda row: {}, "none": lambda row: {"latents": np.zeros((0, _width(runtime)))}}
    for limit in limits:
        ways[f"{limit:g}"] = lambda row, limit=limit: {"early_exit": limit}
    return {name: demo_model.summary(found) for name, found in demo_model.ask(runtime, rows, ways).items()}


def _fitted(runtime: vlrt.Runtime, rows: list[Triplet]) -> float:
    found = demo_model.ask(runtime, rows, {"all": lambda row: {}})["all"]
    chances = [[max((asked.answer.scores or {})[name], 1e-300) for name in demo_model.CHOICES] for asked in found]
    right = [demo_model.CHOICES.index(asked.row.answer) for asked in found]
    return calibration.fit_temperature([np.log(row).tolist() for row in chances], right)


def _width(runtime: vlrt.Runtime) -> int:
    return runtime.model.decoder.hidden_size


if __name__ == "__main__":
    main()
