"""What it costs and saves not to show a model all tokens of a video: accuracy of the trained demo model, tokens, time.

    python -m benches.bench_reduction [--clips 100] [--shape small --precision int8 --frames 64 --rounds 3]

Tokens are dropped as unchanged (`Reduction.unchanged`; for a share of 25, 50 or 75 % by the tolerance that comes
closest, clip by clip), for the question (`Reduction.keep`), and, as a control, at random. With a shape, the time of an
untrained model of that shape is measured as well: of its accuracy nothing can be said.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from rich.console import Console
from rich.progress import track

import vlrt
from benches import demo_model, machine, material
from vlrt import preprocess, video
from vlrt.content import Source
from vlrt.quantiles import quantiles
from vlrt.reduction import Reduction, changed
from vlrt.train.triplets import Triplet

SHARES = (0.25, 0.5, 0.75)  # that are dropped
TOLERANCES = (0.0, 1.0, 2.0, 4.0)  # levels, as a user would set them


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_reduction", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--clips", type=int, default=100)
    parser.add_argument("--shape")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = demo_model.questions(args.clips)
    with vlrt.Runtime.open(demo_model.bundle(), threads=args.threads, video_cache_bytes=0) as runtime:
        found = _accuracy(runtime, rows)
    timed = None
    if args.shape:
        path = material.bundle(args.shape, args.precision)
        with vlrt.Runtime.open(path, threads=args.threads, video_cache_bytes=0) as runtime:
            timed = _times(runtime, material.clip(), args.frames, args.rounds)
    out = machine.write_result(
        "reduction", argv if argv is not None else sys.argv[1:], args.out, accuracy=found, times=timed
    )
    print(f"{'way':22} {'dropped':>8} {'tokens':>7} {'accuracy':>9}")
    for name, row in found.items():
        print(f"{name:22} {row['share_dropped']:8.0%} {row['video_tokens']:7.1f} {row['accuracy']:9.3f}")
    for name, row in (timed or {}).items():
        print(f"{name:22} {row['video_tokens']:7} tokens {row['total']['median']:8.2f} s")
    print(out)


def _accuracy(runtime: vlrt.Runtime, rows: list[Triplet]) -> dict[str, Any]:
    ways: dict[str, Any] = {"all tokens": lambda row: {}}
    for level in TOLERANCES:
        ways[f"unchanged={level:g}"] = lambda row, level=level: {"reduce": Reduction(unchanged=level)}
    for share in SHARES:
        ways[f"unchanged, {share:.0%}"] = lambda row, share=share: {"reduce": _closest(runtime, row.video, share)}
        ways[f"question, {share:.0%}"] = lambda row, share=share: {"reduce": Reduction(keep=1 - share)}
    found = demo_model.ask(runtime, rows, ways)
    random = {f"random, {share:.0%}": ways[f"question, {share:.0%}"] for share in SHARES}
    with mock.patch("vlrt.memory.related", _at_random):
        found |= demo_model.ask(runtime, rows, random)
    return {name: demo_model.summary(answers) for name, answers in found.items()}


def _times(runtime: vlrt.Runtime, clip: Path, num_frames: int, rounds: int) -> dict[str, Any]:
    """Time each way in turn, 4 latents and 4 tokens of answer."""
    ways = {"all tokens": None}
    for share in SHARES:
        ways[f"unchanged, {share:.0%}"] = _closest(runtime, clip, share, num_frames)
        ways[f"question, {share:.0%}"] = Reduction(keep=1 - share)
    answers: dict[str, list[vlrt.Answer]] = {name: [] for name in ways}
    for number in track(range(rounds + 1), "rounds", console=Console(stderr=True)):  # the first warms up
        for name, reduce in ways.items():
            answer = runtime.ask(clip, "What moves?", num_frames=num_frames, reduce=reduce, max_tokens=4, min_tokens=4)
            if number:
                answers[name].append(answer)
    return {
        name: {
            "video_tokens": found[0].usage.video_tokens,
            **{stage: quantiles([answer.timings[stage] for answer in found]) for stage in found[0].timings},
        }
        for name, found in answers.items()
    }


def _closest(runtime: vlrt.Runtime, source: Source, share: float, num_frames: int | None = None) -> Reduction:
    """Return the reduction whose tolerance drops a share of a clip's tokens, as nearly as any does."""
    cfg = runtime.model
    frames = preprocess.resized(video.load(source, cfg.video, cfg.vision, num_frames=num_frames), cfg.video, cfg.vision)

    def miss(tolerance: float) -> float:
        return abs(1 - float(changed(frames, cfg.vision, tolerance).mean()) - share)

    return Reduction(unchanged=min([0.0, *np.geomspace(0.05, 255, 60).tolist()], key=miss))


def _at_random(tokens: Any, question: Any, keep: float) -> Any:
    """Keep as many tokens as `related` does, whatever they are."""
    picked = np.random.default_rng(len(tokens) + int(1e6 * np.abs(tokens).sum()) % 2**32)
    kept = np.zeros(len(tokens), np.bool_)
    kept[picked.permutation(len(tokens))[: Reduction(keep=keep).num_kept(len(tokens))]] = True
    return kept


if __name__ == "__main__":
    main()
