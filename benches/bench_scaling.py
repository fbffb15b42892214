"""How each stage grows with the frames of a video, and with the questions about it, with the fitted exponents.

    python -m benches.bench_scaling [--shape small] [--precision int8] [--frames 8 16 32 64 128 256 512] [--rounds 3]
        [--questions 32] [--question-frames 16]

An exponent is the slope of log seconds over log frames (or questions): 1 grows as fast as they do. Questions are asked
about one open video, each after the other; the first takes decoding and the vision tower too.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benches import machine, material
from benches.engines.client import Client
from benches.engines.protocol import Request
from vlrt.bench import QUESTION, STAGES
from vlrt.quantiles import quantiles

ANSWER_TOKENS = 4


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print tables, write JSON; return its path."""
    args = _arguments(argv)
    console = Console(stderr=True, width=140)
    settings = {"bundle": str(material.bundle(args.shape, args.precision)), "threads": args.threads}
    seconds = max(material.SECONDS, -(-max(args.frames) // material.FPS))
    clip = str(material.clip(seconds))
    with (
        tempfile.TemporaryDirectory() as logs,
        Client("vlrt_engine", settings, threads=args.threads, log=Path(logs, "vlrt.log")) as engine,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("", total=len(args.frames) * (args.rounds + 1) + 1)
        frames = _frames(args, engine, clip, progress, task)
        progress.update(task, description=f"{args.questions} questions")
        request = Request(clip, "", QUESTION, ANSWER_TOKENS, num_frames=args.question_frames, reasoning="latent")
        asked = engine.ask(Request(**{**request.to_json(), "questions": args.questions}))
        progress.advance(task)
        described = engine.described
    questions = [
        {"questions": count, "seconds": asked["after"][count - 1]}
        for count in (2**power for power in range(args.questions.bit_length()))
        if count <= args.questions
    ]
    fits = {stage: exponent([(r["num_frames"], r["seconds"][stage]["median"]) for r in frames]) for stage in STAGES}
    fits["questions"] = exponent([(row["questions"], row["seconds"]) for row in questions])
    out = machine.write_result(
        "scaling",
        argv if argv is not None else sys.argv[1:],
        args.out,
        shape=args.shape,
        precision=args.precision,
        threads=args.threads,
        answer_tokens=ANSWER_TOKENS,
        question_frames=args.question_frames,
        frames=frames,
        questions=questions,
        opened_seconds=asked["opened"],
        exponents=fits,
        engine=described,
    )
    console.print(table(frames, fits))
    console.print(_questions_table(questions, fits["questions"]))
    console.print(str(out))
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.bench_scaling", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 16, 32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=20, help="after which no further round is begun")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--question-frames", type=int, default=16)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _frames(args: argparse.Namespace, engine: Client, clip: str, progress: Progress, task: Any) -> list[dict[str, Any]]:
    """Return a row per number of frames; each round goes through all of them, and the first warms up."""
    end = time.monotonic() + args.minutes * 60
    samples: dict[int, list[dict[str, Any]]] = {count: [] for count in args.frames}
    for number in range(args.rounds + 1):
        for count in args.frames:
            progress.update(task, description=f"{count} frames", advance=1)
            if number > 1 and time.monotonic() > end:
                continue
            request = Request(clip, "", QUESTION, ANSWER_TOKENS, num_frames=count, reasoning="latent")
            reply = engine.ask(request)
            if number:
                samples[count].append(reply)
    return [
        {
            "num_frames": count,
            "rounds": len(found),
            "seconds": {stage: quantiles([reply["stages"][stage] for reply in found]) for stage in STAGES},
            "usage": found[-1]["usage"],
        }
        for count, found in samples.items()
    ]


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """Return b of seconds = a * size**b by least squares of the logarithms; None: under two points above zero."""
    points = [(size, seconds) for size, seconds in points if seconds > 0]
    if len(points) < 2:
        return None
    return float(np.polyfit(*np.log(np.array(points, np.float64)).T, 1)[0])


def table(frames: Sequence[dict[str, Any]], fits: dict[str, float | None]) -> Table:
    """Return seconds per stage and number of frames, and the exponents."""
    made = Table(title="seconds over frames (medians)")
    for column in ("frames", "rounds", *STAGES, "peak MB"):
        made.add_column(column, justify="right")
    for row in frames:
        seconds = [f"{row['seconds'][stage]['median']:.3f}" for stage in STAGES]
        peak = f"{row['usage']['peak_host_memory_bytes'] / 1e6:.0f}"
        made.add_row(str(row["num_frames"]), str(row["rounds"]), *seconds, peak)
    shown = ["" if fits[stage] is None else f"{fits[stage]:.2f}" for stage in STAGES]
    made.add_row("exponent", "", *shown, "", style="bold")
    return made


def _questions_table(questions: Sequence[dict[str, Any]], fit: float | None) -> Table:
    made = Table(title=f"seconds over questions about one video; exponent {'-' if fit is None else f'{fit:.2f}'}")
    for row in questions:
        made.add_column(str(row["questions"]), justify="right")
    made.add_row(*(f"{row['seconds']:.2f}" for row in questions))
    return made


if __name__ == "__main__":
    main()
