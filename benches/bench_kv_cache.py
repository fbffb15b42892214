"""Answers with keys and values kept in int8 beside those in float32: agreement, accuracy, bytes kept.

    python -m benches.bench_kv_cache BUNDLE DATA [--rows 200] [--frames N]

DATA is a file of triplets that the bundle's model was trained for: `vlrt data synth`, and the bundle of a model that
ships. Every question is asked freely with both, of a video that is read anew.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import vlrt
from benches import machine
from vlrt import scoring
from vlrt.answer import Answer
from vlrt.train import triplets

KINDS = ("fp32", "int8")


def main(argv: Sequence[str] | None = None) -> None:
    """Ask, print the agreement, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_kv_cache", description=__doc__.split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    rows = triplets.read(args.data).rows[: args.rows]
    answers: dict[str, list[Answer]] = {}
    kept: dict[str, int] = {}
    for kind in KINDS:
        with vlrt.Runtime.open(args.bundle, threads=args.threads, video_cache_bytes=0, kv_cache=kind) as runtime:
            answers[kind] = [runtime.ask(row.video, row.asked, max_tokens=16, num_frames=args.frames) for row in rows]
            with runtime.open_video(rows[0].video, num_frames=args.frames) as clip:
                assert clip._memory is not None, "the clip is open"
                kept[kind] = clip._memory.num_bytes
    pairs = list(zip(*answers.values(), strict=True))
    drift = [
        float(np.linalg.norm(a.latents - b.latents) / np.linalg.norm(a.latents))
        for a, b in pairs
        if a.latents is not None and b.latents is not None
    ]
    found = {
        "questions": len(rows),
        "same_answers": sum(a.token_ids == b.token_ids for a, b in pairs),
        "latents_relative_error": {"mean": float(np.mean(drift)), "largest": max(drift)} if drift else None,
        "score": {
            kind: float(
                np.mean([scoring.score(r.problem_type, a.text, r.target) for r, a in zip(rows, given, strict=True)])
            )
            for kind, given in answers.items()
        },
        "kept_bytes_of_the_first_video": kept,
    }
    out = machine.write_result("kv_cache", argv if argv is not None else sys.argv[1:], args.out, **found)
    print(f"{found['same_answers']} of {len(rows)} answers are the same; scores {found['score']}; kept {kept}\n{out}")


if __name__ == "__main__":
    main()
