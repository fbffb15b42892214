"""Questions about an open video asked side by side, beside asking them in turn, and each from the file.

    python -m benches.bench_batch [--shape small] [--precision int8] [--frames 64] [--rounds 5] [--questions 8]

Reported: medians with p20 and p80, and ratios of the medians. In each round, in turn: `many` and `turns` answer the
questions about a video that is open; `apart` asks each from the file, nothing being remembered. Answers are
`--tokens` tokens after latents, forced: the weights are untrained. In fp32 `many` must equal `turns`.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

import vlrt
from benches import machine, material
from vlrt.quantiles import quantiles


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_batch", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    clip, console = material.clip(), Console(stderr=True)
    times: dict[str, list[float]] = {"many": [], "turns": [], "apart": []}
    forced = {"max_tokens": args.tokens, "min_tokens": args.tokens}
    asked = [
        {"question": f"What moves at second {i}, and which way does it go?", **forced} for i in range(args.questions)
    ]
    with (
        vlrt.Runtime.open(material.bundle(args.shape, args.precision), video_cache_bytes=0) as runtime,
        runtime.open_video(clip, num_frames=args.frames) as opened,
    ):
        for number in track(range(args.rounds + 1), "rounds", console=console):  # the first warms up
            start = time.perf_counter()
            many = opened.ask_many(asked)
            took = {"many": time.perf_counter() - start}
            start = time.perf_counter()
            turns = [opened.ask(**one) for one in asked]
            took["turns"] = time.perf_counter() - start
            if number:
                start = time.perf_counter()
                runtime.ask(clip, num_frames=args.frames, **asked[0])
                took["apart"] = args.questions * (time.perf_counter() - start)
            same = [a.token_ids == b.token_ids for a, b in zip(many, turns, strict=True)]
            assert all(same) or args.precision != "fp32", "an answer differs from the one that was asked for alone"
            for name, seconds in took.items():
                times[name].extend([seconds] * bool(number))
    seconds = {name: quantiles(found) for name, found in times.items()}
    ratios = {name: seconds[name]["median"] / seconds["many"]["median"] for name in ("turns", "apart")}
    gaps = [
        float(np.linalg.norm(a.latents - b.latents) / np.linalg.norm(b.latents))
        for a, b in zip(many, turns, strict=True)
        if a.latents is not None
    ]
    out = machine.write_result(
        "batch",
        argv if argv is not None else sys.argv[1:],
        args.out,
        video_tokens=many[0].usage.video_tokens,
        questions=args.questions,
        equal_answers=sum(same),
        largest_relative_error_of_latents=max(gaps, default=0.0),
        stages={
            name: {stage: round(value, 4) for stage, value in answer.timings.items()}
            for name, answer in (("many", many[0]), ("turns", turns[0]))
        },
        seconds=seconds,
        times_many=ratios,
    )
    print(f"{args.questions} questions side by side {seconds['many']['median']:.2f} s; {sum(same)} answers as in turn;")
    print(f"in turn {ratios['turns']:.2f} of it, apart (one of them, so many times) {ratios['apart']:.2f}")
    print(out)


if __name__ == "__main__":
    main()
