"""Latents that stop once a choice is certain: accuracy and time of the trained demo model by the probability asked for.

    python -m benches.bench_early_exit [--clips 100] [--limits 0.5 0.8 0.9 0.95 0.99 0.999] [--shape small]

Measured at temperature 1, and at the temperature that fits clips of the validation split, where one does. With a shape,
the time of an untrained model's latents is measured as well: all of them, all with a question behind each, and one.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import vlrt
from benches import demo_model, machine, material
from vlrt import calibration
from vlrt.errors import ConfigError
from vlrt.quantiles import quantiles
from vlrt.train.triplets import Triplet


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_early_exit", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--limits", type=float, nargs="+", default=[0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
    parser.add_argument("--shape")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
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
    timed = None
    if args.shape:
        path = material.bundle(args.shape, args.precision)
        with vlrt.Runtime.open(path, threads=args.threads, video_cache_bytes=0) as runtime:
            timed = _times(runtime, args.frames, args.rounds)
    given = argv if argv is not None else sys.argv[1:]
    out = machine.write_result(
        "early_exit", given, args.out, temperature=temperature, curves=curves, latents_seconds=timed
    )
    for name, curve in curves.items():
        print(f"temperature {name}\n{'until':>10} {'accuracy':>9} {'latents':>8} {'calibration error':>18} {'ms':>7}")
        for way, row in curve.items():
            took = 1e3 * (row["seconds"]["latents"]["median"] + row["seconds"]["answer"]["median"])
            error = row["calibration_error"]
            print(f"{way:>10} {row['accuracy']:9.3f} {row['latents']:8.2f} {error:18.3f} {took:7.2f}")
    for name, found in (timed or {}).items():
        print(f"{args.shape} {args.precision}, {name}: latents {1e3 * found['median']:.1f} ms")
    print(f"fitted temperature: {temperature}\n{out}")


def _curve(runtime: vlrt.Runtime, rows: list[Triplet], limits: Sequence[float]) -> dict[str, Any]:
    ways: dict[str, Any] = {"all": lambda row: {}, "none": lambda row: {"latents": np.zeros((0, _width(runtime)))}}
    for limit in limits:
        ways[f"{limit:g}"] = lambda row, limit=limit: {"early_exit": limit}
    return {name: demo_model.summary(found) for name, found in demo_model.ask(runtime, rows, ways).items()}


def _times(runtime: vlrt.Runtime, num_frames: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time the latents of a question about an open video, ways in turn."""
    ways: dict[str, dict[str, float]] = {"all": {}, "all, asked behind each": {"early_exit": 1.0}}
    ways["one"] = {"early_exit": 1e-9}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    with runtime.open_video(material.clip(), num_frames=num_frames) as clip:
        for number in range(rounds + 1):  # the first warms up
            for name, options in ways.items():
                answer = clip.ask("Which way?", choices=["left", "right"], **options)
                assert answer.usage.latents == (1 if name == "one" else runtime.model.latent.num_latents)
                if number:
                    seconds[name].append(answer.timings["latents"])
    return {name: quantiles(found) for name, found in seconds.items()}


def _fitted(runtime: vlrt.Runtime, rows: list[Triplet]) -> float:
    found = demo_model.ask(runtime, rows, {"all": lambda row: {}})["all"]
    chances = [[max((asked.answer.scores or {})[name], 1e-300) for name in demo_model.CHOICES] for asked in found]
    right = [demo_model.CHOICES.index(asked.row.answer) for asked in found]
    return calibration.fit_temperature([np.log(row).tolist() for row in chances], right)


def _width(runtime: vlrt.Runtime) -> int:
    return runtime.model.decoder.hidden_size


if __name__ == "__main__":
    main()
