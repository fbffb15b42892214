"""Time to answer by stage, for shapes x frames x precisions x ways of reasoning, with peak memory.

    python -m benches.bench_stages [--shapes tiny small] [--frames 16 64] [--precisions fp32 int8] [--rounds 5]

Each bundle lives in a process of its own, so that peak memory is its own; processes answer in turn, round by round, so
that what disturbs the machine disturbs all. Reported: medians with p20 and p80 over the rounds. The answer is forced to
4 tokens and the chain to --cot-tokens: the weights are untrained. Before anything is timed the bundle must have passed
its parity gate, and every answer must repeat itself.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vlrt
from benches import machine, material
from vlrt.answer import peak_host_memory_bytes
from vlrt.bundle import Bundle
from vlrt.quantiles import quantiles

STAGES = ("decode", "preprocess", "vision", "prefill", "latents", "answer", "total")
QUESTION = "What moves first, and which way does it go?"
ANSWER_TOKENS = 4


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    args = _arguments(argv)
    bundles = {(s, p): material.bundle(s, p) for s in args.shapes for p in args.precisions}
    parity = {" ".join(key): [vars(row) for row in Bundle.open(path).parity] for key, path in bundles.items()}
    assert all(row["ok"] for rows in parity.values() for row in rows), "a bundle did not pass its parity gate"
    clip = material.clip()
    workers = {key: _start(path, clip, args.threads) for key, path in bundles.items()}
    cases = [(key, n, how) for n in args.frames for how in ("direct", "latent", "cot") for key in bundles]
    samples: dict[tuple[Any, ...], list[dict[str, Any]]] = {case: [] for case in cases}
    cold = {key: connection.recv() for key, connection in workers.items()}
    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task("rounds", total=(args.rounds + 1) * len(cases))
        for i in range(args.rounds + 1):  # the first round warms up
            for case in cases:
                key, num_frames, how = case
                if how != "cot" or i <= args.cot_rounds:
                    tokens = ANSWER_TOKENS + (args.cot_tokens if how == "cot" else 0)
                    sample = _ask(workers[key], num_frames, how, tokens)
                    if i:
                        samples[case].append(sample)
                progress.advance(task)
    rows = [_row(case, samples[case], cold[case[0]]) for case in cases]
    for connection in workers.values():
        connection.send(None)
    out = machine.write_result(
        "stages",
        argv if argv is not None else sys.argv[1:],
        args.out,
        answer_tokens=ANSWER_TOKENS,
        cot_tokens=args.cot_tokens,
        rows=rows,
        parity=parity,
    )
    Console(width=160).print(_table(rows))
    print(out)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.bench_stages", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", nargs="+", default=["tiny", "small"])
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "int8"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cot-tokens", type=int, default=384)
    parser.add_argument("--cot-rounds", type=int, default=1, help="rounds that also write a chain: it takes long")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _start(path: Path, clip: Path, threads: int | None) -> Connection:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=_worker, args=(theirs, path, clip, threads), daemon=True).start()
    return ours


def _worker(connection: Connection, path: Path, clip: Path, threads: int | None) -> None:
    """Answer requests (num_frames, reasoning, tokens) until told None."""
    start = time.perf_counter()
    runtime = vlrt.Runtime.open(path, threads=threads, video_cache_bytes=0)
    opened = time.perf_counter() - start
    runtime.ask(clip, QUESTION, reasoning="latent", num_frames=16, max_tokens=1)
    first = time.perf_counter() - start
    connection.send(
        {"open_seconds": opened, "open_to_first_answer_seconds": first, "loaded_bytes": peak_host_memory_bytes()}
    )
    answers: dict[Any, Any] = {}
    while (request := connection.recv()) is not None:
        num_frames, how, tokens = request
        answer = runtime.ask(clip, QUESTION, reasoning=how, num_frames=num_frames, max_tokens=tokens, min_tokens=tokens)
        assert answers.setdefault(request, answer.token_ids) == answer.token_ids, "an answer did not repeat itself"
        connection.send({**answer.timings, "usage": vars(answer.usage)})


def _ask(connection: Connection, num_frames: int, how: str, tokens: int) -> dict[str, Any]:
    connection.send((num_frames, how, tokens))
    found: dict[str, Any] = connection.recv()
    return found


def _row(case: tuple[Any, ...], samples: list[dict[str, Any]], cold: dict[str, Any]) -> dict[str, Any]:
    (shape, precision), num_frames, how = case
    return {
        "shape": shape,
        "precision": precision,
        "num_frames": num_frames,
        "reasoning": how,
        "rounds": len(samples),
        "seconds": {stage: quantiles([s[stage] for s in samples]) for stage in STAGES},
        "usage": samples[-1]["usage"],
        "cold": cold,
    }


def _table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="seconds per stage (medians), peak memory of the process so far")
    for name in ("shape", "precision", "frames", "reasoning", *STAGES, "peak MB", "cold start"):
        table.add_column(name, justify="left" if name in ("shape", "precision", "reasoning") else "right")
    for row in rows:
        seconds = [f"{row['seconds'][stage]['median']:.3f}" for stage in STAGES]
        peak = f"{row['usage']['peak_host_memory_bytes'] / 1e6:.0f}"
        first = f"{row['cold']['open_to_first_answer_seconds']:.2f}"
        table.add_row(row["shape"], row["precision"], str(row["num_frames"]), row["reasoning"], *seconds, peak, first)
    return table


if __name__ == "__main__":
    main()
