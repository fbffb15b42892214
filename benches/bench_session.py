"""Questions about an open video beside a first question about it, in turn; and many questions beside one.

    python -m benches.bench_session [--shape small] [--precision int8] [--frames 64] [--rounds 5] [--questions 32]

Reported: medians with p20 and p80, and ratios of the medians. The video is decoded and encoded anew for each first
question; answers are 4 tokens after latents, forced: the weights are untrained. Answers of both ways must be equal.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

import vlrt
from benches import machine, material
from vlrt.quantiles import quantiles

ANSWER = {"max_tokens": 4, "min_tokens": 4}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print ratios, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_session", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    clip, console = material.clip(), Console(stderr=True)
    times: dict[str, list[float]] = {"first": [], "second": [], "many": [], "side_by_side": []}
    questions = [f"What moves at second {i}, and which way does it go?" for i in range(args.questions)]
    with vlrt.Runtime.open(material.bundle(args.shape, args.precision), video_cache_bytes=0) as runtime:
        for number in track(range(args.rounds + 1), "rounds", console=console):  # the first warms up
            start = time.perf_counter()
            first = runtime.ask(clip, questions[0], num_frames=args.frames, **ANSWER)
            took = {"first": time.perf_counter() - start}
            start = time.perf_counter()
            with runtime.open_video(clip, num_frames=args.frames) as opened:
                answers = [opened.ask(question, **ANSWER) for question in questions]
                took["many"] = time.perf_counter() - start
                start = time.perf_counter()
                again = opened.ask(questions[0], **ANSWER)
                took["second"] = time.perf_counter() - start
            start = time.perf_counter()
            with runtime.open_video(clip, num_frames=args.frames) as opened:
                opened.ask_many([{"question": question, **ANSWER} for question in questions])
                took["side_by_side"] = time.perf_counter() - start
            assert again.token_ids == answers[0].token_ids, "an answer did not repeat itself"
            if number:
                for name, seconds in took.items():
                    times[name].append(seconds)
    seconds = {name: quantiles(found) for name, found in times.items()}
    ratios = {name: seconds[name]["median"] / seconds["first"]["median"] for name in ("second", "many", "side_by_side")}
    out = machine.write_result(
        "session",
        argv if argv is not None else sys.argv[1:],
        args.out,
        video_tokens=first.usage.video_tokens,
        questions=args.questions,
        same_as_first=again.token_ids == first.token_ids,
        seconds=seconds,
        times_first=ratios,
    )
    print(f"first question {seconds['first']['median']:.2f} s; a second one {ratios['second']:.3f} of it;")
    print(f"{args.questions} questions about one open video {ratios['many']:.2f} of it one by one,")
    print(f"{ratios['side_by_side']:.2f} by ask_many\n{out}")


if __name__ == "__main__":
    main()
