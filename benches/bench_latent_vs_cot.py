"""Latents against a written chain of thought: the same backbone, video, question and machine, in turn.

    python -m benches.bench_latent_vs_cot [--shape small] [--precision int8] [--frames 16] [--rounds 5]
        [--latents 8] [--parallel-rounds 2] [--cot-tokens 128 256 384 512 1024] [--hf-tokens 384]

Time to answer from the path of a video file to the last token, warm, of vlrt answering directly, after latents and
after chains; and of Hugging Face transformers (bf16, SDPA) directly and after a chain, on the same checkpoint.
Reasoning overhead: time with reasoning less time of answering directly; its ratio, chain over latents. End to end: time
to answer, chain over latents. Weights are random: lengths are forced, the answer to 4 tokens. Latents are rolled out
one after the other; a second bundle has the parallel rollout in a few rounds, each of which is one pass for all.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benches import machine, material
from benches.engines import peers
from benches.engines.client import Absent, Client
from benches.engines.protocol import Request
from vlrt.bench import QUESTION
from vlrt.quantiles import quantiles

ANSWER_TOKENS = 4
HF, PARALLEL = "hf-bf16", "vlrt-parallel"
Case = tuple[str, str, int]  # engine, reasoning, tokens of the chain
Samples = dict[Case, list[dict[str, Any]]]


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print a table, write JSON; return its path."""
    args = _arguments(argv)
    console = Console(stderr=True, width=140)
    absent: dict[str, str] = {}
    bundles = {"vlrt": (material.bundle(args.shape, args.precision), {"num_latents": args.latents})}
    if args.parallel_rounds and args.latents == material.PARALLEL_LATENTS:
        bundles[PARALLEL] = (material.bundle(args.shape, args.precision, args.parallel_rounds), {})
    with tempfile.TemporaryDirectory() as logs, contextlib.ExitStack() as stack:
        engines = {}
        for name, (bundle, more) in bundles.items():
            settings = {"bundle": str(bundle), "threads": args.threads, **more}
            engine = Client("vlrt_engine", settings, threads=args.threads, log=Path(logs, f"{name}.log"))
            engines[name] = stack.enter_context(engine)
        try:
            if args.hf_tokens:
                engine = peers.start(peers.PEERS[HF], args.shape, threads=args.threads, log=Path(logs, "hf.log"))
                engines[HF] = stack.enter_context(engine)
        except Absent as reason:
            absent[HF] = str(reason)
        found = {count: _measure(args, engines, count, console) for count in args.frames}
        described = {name: engine.described for name, engine in engines.items()}
    results = [{"num_frames": count, "rows": rows(samples), **ratios(samples)} for count, samples in found.items()]
    out = machine.write_result(
        "latent_vs_cot",
        argv if argv is not None else sys.argv[1:],
        args.out,
        shape=args.shape,
        precision=args.precision,
        threads=args.threads,
        num_latents=args.latents,
        parallel_rounds=args.parallel_rounds if PARALLEL in described else 0,
        answer_tokens=ANSWER_TOKENS,
        lengths="forced: the weights are random",
        results=results,
        engines=described,
        absent=absent,
    )
    for result in results:
        console.print(table(result))
    console.print(str(out))
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.bench_latent_vs_cot", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", nargs="+", type=int, default=[16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cot-rounds", type=int, default=1, help="rounds that also write chains: they take long")
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--parallel-rounds", type=int, default=2, help="of the parallel rollout, of 8 latents; 0: none")
    parser.add_argument("--cot-tokens", nargs="+", type=int, default=[128, 256, 384, 512, 1024])
    parser.add_argument("--hf-tokens", type=int, default=384, help="of transformers' chain; 0: none")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def _measure(args: argparse.Namespace, engines: dict[str, Client], num_frames: int, console: Console) -> Samples:
    quick: list[Case] = [("vlrt", "direct", 0), ("vlrt", "latent", 0)]
    if PARALLEL in engines:
        quick.append((PARALLEL, "latent", 0))
    chains: list[Case] = [("vlrt", "cot", tokens) for tokens in args.cot_tokens]
    if HF in engines:
        quick.append((HF, "direct", 0))
        chains.append((HF, "cot", args.hf_tokens))
    plan = list(quick)  # warms up
    for number in range(args.rounds):
        plan += [*quick, *(chains if number < args.cot_rounds else [])]
    samples: Samples = {}
    answers: dict[Case, list[int]] = {}
    with Progress(console=console) as progress:
        task = progress.add_task("", total=len(plan))
        for number, case in enumerate(plan):
            engine, reasoning, chain = case
            progress.update(task, description=f"{engine}: {_name(case)}, {num_frames} frames", completed=number)
            tokens = ANSWER_TOKENS + chain
            request = Request(str(material.clip()), "", QUESTION, tokens, num_frames=num_frames, reasoning=reasoning)
            reply = engines[engine].ask(request)
            assert answers.setdefault(case, reply["token_ids"]) == reply["token_ids"], "an answer did not repeat itself"
            if number >= len(quick):
                samples.setdefault(case, []).append(reply)
        progress.update(task, completed=len(plan))
    return samples


def rows(samples: Samples) -> list[dict[str, Any]]:
    """Return a row per case: quantiles of seconds in all and, of vlrt, per stage."""
    made = []
    for case, replies in samples.items():
        engine, reasoning, chain = case
        stages = replies[0].get("stages", {})
        by_stage = {stage: quantiles([reply["stages"][stage] for reply in replies]) for stage in stages}
        row = {"engine": engine, "case": _name(case), "reasoning": reasoning, "chain_tokens": chain}
        row |= {"rounds": len(replies), "seconds": {**by_stage, "total": quantiles([r["seconds"] for r in replies])}}
        row |= {"totals": [r["seconds"] for r in replies], "usage": replies[-1].get("usage")}
        made.append(row)
    return made


def ratios(samples: Samples) -> dict[str, Any]:
    """Return seconds that reasoning takes, and both ratios of each chain to vlrt's latents; None: lost in noise.

    Of the parallel rollout, where it was asked: seconds, and the ratio of overheads of each chain.
    """
    totals = {case: [reply["seconds"] for reply in replies] for case, replies in samples.items()}
    direct, latent = totals[("vlrt", "direct", 0)], totals[("vlrt", "latent", 0)]

    def beyond_direct(case: Case) -> float:  # of the same round
        return statistics.median(b - a for a, b in zip(direct, totals[case], strict=True))

    overhead = beyond_direct(("vlrt", "latent", 0))
    parallel = beyond_direct((PARALLEL, "latent", 0)) if (PARALLEL, "latent", 0) in samples else None
    stage = statistics.median(reply["stages"]["latents"] for reply in samples[("vlrt", "latent", 0)])
    chains = []
    for case in (case for case in samples if case[1] == "cot"):
        took = statistics.median(totals[case])
        over = took - statistics.median(totals[(case[0], "direct", 0)])
        chains.append(
            {
                "engine": case[0],
                "chain_tokens": case[2],
                "end_to_end_ratio": took / statistics.median(latent),
                "overhead_seconds": over,
                "overhead_ratio": over / overhead if overhead > 0 else None,
                "overhead_ratio_to_stage": over / stage,
                "overhead_ratio_to_parallel": over / parallel if parallel is not None and parallel > 0 else None,
            }
        )
    return {
        "latent_overhead_seconds": overhead,
        "latent_stage_seconds": stage,
        "parallel_overhead_seconds": parallel,
        "chains": chains,
    }


def table(result: dict[str, Any]) -> Table:
    """Return the rows of one length of video, with the ratios of the chains."""
    made = Table(title=f"{result['num_frames']} frames: seconds to answer (medians); chains over latents")
    for column in (
        "engine",
        "case",
        "rounds",
        "seconds",
        "end to end",
        "overhead",
        "over stage latents",
        "over parallel",
    ):
        made.add_column(column, justify="left" if column in ("engine", "case") else "right")
    chains = {(chain["engine"], chain["chain_tokens"]): chain for chain in result["chains"]}
    for row in result["rows"]:
        chain = chains.get((row["engine"], row["chain_tokens"]), {})
        names = ("end_to_end_ratio", "overhead_ratio", "overhead_ratio_to_stage", "overhead_ratio_to_parallel")
        shown = [f"{chain[name]:.1f}" if chain.get(name) is not None else "" for name in names]
        made.add_row(row["engine"], row["case"], str(row["rounds"]), f"{row['seconds']['total']['median']:.3f}", *shown)
    return made


def _name(case: Case) -> str:
    return f"chain of {case[2]}" if case[1] == "cot" else case[1]


if __name__ == "__main__":
    main()
