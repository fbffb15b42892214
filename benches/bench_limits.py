"""How near a model's stages come to what the machine can do: its own ceilings, measured in the same run.

    python -m benches.bench_limits [--shape small] [--precision int8] [--frames 16 64] [--rounds 5]

The ceilings are the fastest matrix product per dtype by the libraries at hand, and the rates of reading and copying
memory. Set against them: vision and prefill, by the useful operations that they need; answer steps, by the bytes of
weights that each must read; and the peak of memory, by weights, KV cache and the largest activation.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benches import counts, machine, material
from benches.engines.client import ROOT, Client
from benches.engines.protocol import Request
from vlrt import config, positions
from vlrt.bench import QUESTION
from vlrt.bundle import Bundle
from vlrt.quantiles import quantiles

STEPS = 32  # of the decoder; the output head runs once more
WEIGHT_BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # scales aside
HEAD_BYTES = {**WEIGHT_BYTES, "int4": 1.0}


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure, print tables, write JSON; return its path."""
    args = _arguments(argv)
    console = Console(stderr=True, width=140)
    bundle = material.bundle(args.shape, args.precision)
    model = Bundle.open(bundle).model
    console.print("measuring the machine's ceilings")
    before = ceilings(args.threads, tiny=args.tiny_ceilings)
    settings = {"bundle": str(bundle), "threads": args.threads}
    with (
        tempfile.TemporaryDirectory() as logs,
        Client("vlrt_engine", settings, threads=args.threads, log=Path(logs, "vlrt.log")) as engine,
        Progress(console=console) as progress,
    ):
        task = progress.add_task("", total=(args.rounds + 1) * len(args.frames))
        samples: dict[int, list[dict[str, Any]]] = {count: [] for count in args.frames}
        for number in range(args.rounds + 1):  # the first round warms up
            for count in args.frames:
                progress.update(task, description=f"vlrt: {count} frames", advance=1)
                request = Request(str(material.clip()), "", QUESTION, 1 + STEPS, num_frames=count)
                reply = engine.ask(request)
                if number:
                    samples[count].append(reply)
        described = engine.described
    rows = [row(model, args.precision, described, count, found, before) for count, found in samples.items()]
    out = machine.write_result(
        "limits",
        argv if argv is not None else sys.argv[1:],
        args.out,
        shape=args.shape,
        precision=args.precision,
        threads=args.threads,
        ceilings=before,
        rows=rows,
        engine=described,
    )
    console.print(_ceilings_table(before))
    console.print(table(rows))
    console.print(str(out))
    return out


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benches.bench_limits", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8", choices=WEIGHT_BYTES)
    parser.add_argument("--frames", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tiny-ceilings", action="store_true", help="of sizes that say nothing, for trials")
    parser.add_argument("--out", type=Path)
    return parser.parse_args(argv)


def ceilings(threads: int, *, tiny: bool = False) -> dict[str, Any]:
    """Return the machine's ceilings, measured in a process of its own; see `benches.ceilings`."""
    command = [sys.executable, "-m", "benches.ceilings", str(threads), *(["--tiny"] if tiny else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def row(
    model: config.Model,
    precision: str,
    engine: dict[str, Any],
    num_frames: int,
    samples: Sequence[dict[str, Any]],
    ceiling: dict[str, Any],
) -> dict[str, Any]:
    """Return what one length of video needs, takes, and which share of the ceilings it reaches."""
    usage = samples[-1]["usage"]
    length, vision = usage["prompt_tokens"], model.vision
    grid = _grid(num_frames, usage["video_tokens"], vision)
    windows = positions.window_index(grid, vision)[1].tolist() if vision.window_size else []
    flops = {
        "vision": counts.vision_flops(vision, grid, windows),
        "prefill": counts.prefill_flops(model.decoder, length),
    }
    stages = [sample["stages"] for sample in samples]
    seconds = {name: quantiles([stage[name] for stage in stages]) for name in ("vision", "prefill", "answer")}
    both = quantiles([stage["vision"] + stage["prefill"] for stage in stages])
    needed = counts.step_bytes(
        model.decoder,
        length + STEPS // 2,
        weight_bytes=WEIGHT_BYTES[precision],
        head_bytes=HEAD_BYTES[precision],
        value_bytes=4,
        with_head=True,
    )
    head = int(model.decoder.vocab_size * model.decoder.hidden_size * HEAD_BYTES[precision])
    steps = STEPS + head / needed["weights"]
    step = seconds["answer"]["median"] / steps
    rate = (flops["vision"] + flops["prefill"]) / both["median"]
    memory = {
        "peak": max(sample["usage"]["peak_host_memory_bytes"] for sample in samples),
        "weights": engine["weight_bytes"],
        "cache": counts.cache_bytes(model.decoder, length + 1 + STEPS),
        "activation": counts.activation_bytes(
            model,
            math.prod(grid),
            length,
            vision_chunk=engine["vision_chunk"],
            prefill_chunk=engine["prefill_chunk"],
        ),
    }
    return {
        "num_frames": num_frames,
        "prompt_tokens": length,
        "rounds": len(samples),
        "flops": flops,
        "seconds": {**seconds, "vision_and_prefill": both},
        "flops_per_second": {
            "vision": flops["vision"] / seconds["vision"]["median"],
            "prefill": flops["prefill"] / seconds["prefill"]["median"],
            "vision_and_prefill": rate,
        },
        "share_of_gemm": {dtype: rate / found["best"] for dtype, found in ceiling["gemm"].items()},
        "step_bytes": needed,
        "step_seconds": step,
        "step_share_of_read": needed["weights"] / step / ceiling["memory"]["read"],
        "memory_bytes": memory,
        "peak_over_need": memory["peak"] / (memory["weights"] + memory["cache"] + memory["activation"]),
    }


def _grid(num_frames: int, video_tokens: int, vision: config.Vision) -> tuple[int, int, int]:
    """Return the patches of square frames."""
    time = math.ceil(num_frames / vision.temporal_patch_size)
    side = math.isqrt(video_tokens * vision.spatial_merge_size**2 // time)
    return time, side, side


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Return the shares as a table."""
    made = Table(title="shares of the machine's ceilings")
    for column in ("frames", "GFLOP", "vision s", "prefill s", "GFLOP/s", "of fp32", "of bf16", "of int8"):
        made.add_column(column, justify="right")
    for column in ("step ms", "of reading", "peak / need"):
        made.add_column(column, justify="right")
    for found in rows:
        seconds, shares = found["seconds"], found["share_of_gemm"]
        made.add_row(
            str(found["num_frames"]),
            f"{sum(found['flops'].values()) / 1e9:.0f}",
            f"{seconds['vision']['median']:.3f}",
            f"{seconds['prefill']['median']:.3f}",
            f"{found['flops_per_second']['vision_and_prefill'] / 1e9:.0f}",
            *(f"{shares[dtype]:.0%}" for dtype in ("fp32", "bf16", "int8")),
            f"{found['step_seconds'] * 1e3:.1f}",
            f"{found['step_share_of_read']:.0%}",
            f"{found['peak_over_need']:.2f}",
        )
    return made


def _ceilings_table(found: dict[str, Any]) -> Table:
    made = Table(title="ceilings")
    for column in ("what", "rate", "by"):
        made.add_column(column)
    for dtype, product in found["gemm"].items():
        made.add_row(f"GEMM {dtype}", f"{product['best'] / 1e9:.0f} GFLOP/s", product["by"])
    memory = found["memory"]
    made.add_row("read", f"{memory['read'] / 1e9:.1f} GB/s", memory["by"])
    made.add_row("copy, read and written", f"{memory['copy'] / 1e9:.1f} GB/s", "torch")
    return made


if __name__ == "__main__":
    main()
