"""Attention on the CPU: libvlrt_ort beside the function bodies of a bundle, alone and in whole answers.

    python -m benches.bench_ort_attention [--rounds 9] [--threads 2] [--shape small] [--precision int8]

One graph, three sessions: the body (GroupQueryAttention; rotary and MultiHeadAttention), the library's kernels in fp32,
and those that may take products in bf16, as in int8 bundles (the same kernels where the processor has none of these).
Outputs are compared before anything is timed; sessions run in turn. FLOPs are the useful ones: two
products per pair of a query and a key that it may see. The share is of the fp32 MatMul of the same run.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from rich.console import Console
from rich.table import Table

from benches import machine, material
from benches.bench_stages import ANSWER_TOKENS, QUESTION, quantiles
from vlrt import ops, prompt
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend, num_usable_cores
from vlrt.bundle import Bundle
from vlrt.export import translate
from vlrt.runtime import Runtime

HEADS, KV_HEADS, DIM = 14, 2, 64  # the decoder of `small`
VISION_HEADS, VISION_DIM, SEGMENT, SEGMENTS = 8, 80, 256, 8  # its tower, eight temporal patches of 224 x 224
VIDEO_CASES = ((590, 0), (2134, 0), (512, 1622), (8, 2134), (1, 590), (1, 2134))  # positions, slots before them
KINDS = ("body", "library", "library bf16")
LEVELS = {"library": ort_library.AUTO, "library bf16": ort_library.AUTO_BF16}
CLOSE = {"library": 1e-4, "library bf16": 2e-2}  # to the body, in parts of the largest value
SECONDS_PER_SAMPLE = 0.02
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print tables, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_ort_attention", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("--shape", default="small")
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--frames", nargs="*", type=int, default=[16, 64], help="none: kernels alone")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: of this process, for one thread on a machine that is busy"
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.clock == "cpu" and (args.threads > 1 or args.frames):
        parser.error("--clock cpu goes with --threads 1 --frames: threads that wait count too, and answers need time")
    library = ort_library.find()
    if isinstance(library, str):
        raise SystemExit(library)
    peak = _gemm_gflops(args)
    kernels = [_video(library, args, peak, *case) for case in VIDEO_CASES]
    kernels.append(_segments(library, args, peak))
    answers = _answers(args) if args.frames else []
    place = Path(__file__).parent / "results" / machine.describe()["name"] / "ort_library.json"
    out = machine.write_result(
        "ort_attention",
        argv if argv is not None else sys.argv[1:],
        args.out or place,
        simd=library.levels,
        threads=args.threads,
        rounds=args.rounds,
        clock=args.clock,
        gemm_gflops=peak,
        kernels=kernels,
        answers=answers,
    )
    console = Console(width=200)
    console.print(_kernel_table(kernels, peak))
    console.print(_answer_table(answers))
    print(out)


def _video(
    library: ort_library.Library, args: argparse.Namespace, peak: float, num_new: int, past: int
) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    slots = past + num_new
    shapes = {
        "q": (1, num_new, HEADS, DIM),
        "k": (1, num_new, KV_HEADS, DIM),
        "v": (1, num_new, KV_HEADS, DIM),
        "cos": (slots, DIM // 2),
        "sin": (slots, DIM // 2),
        "k_cache": (1, KV_HEADS, slots, DIM),
        "v_cache": (1, KV_HEADS, slots, DIM),
    }
    feeds: dict[str, Any] = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    feeds["past_length"] = np.array(past, np.int32)
    model = _model(translate.VideoAttention, feeds, ("out", "k_new", "v_new"), num_heads=HEADS, kv_num_heads=KV_HEADS)
    outputs = {"out": np.empty_like(feeds["q"]), "k_new": feeds["k_cache"], "v_new": feeds["v_cache"]}
    pairs = num_new * past + num_new * (num_new + 1) // 2
    found = _compare(library, args, model, feeds, outputs, 4 * pairs * HEADS * DIM, peak)
    return {"op": "VideoAttention", "positions": num_new, "past": past, **found}


def _segments(library: ort_library.Library, args: argparse.Namespace, peak: float) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    count = SEGMENT * SEGMENTS
    wide, narrow = (count, VISION_HEADS, VISION_DIM), (count, VISION_DIM // 2)
    feeds: dict[str, Any] = {
        name: rng.standard_normal(narrow if name in ("cos", "sin") else wide, np.float32)
        for name in ("q", "k", "v", "cos", "sin")
    }
    feeds["cu_seqlens"] = np.arange(0, count + 1, SEGMENT, dtype=np.int32)
    model = _model(translate.SegmentAttention, feeds, ("out",), num_heads=VISION_HEADS)
    flops = 4 * count * SEGMENT * VISION_HEADS * VISION_DIM
    found = _compare(library, args, model, feeds, {"out": np.empty_like(feeds["q"])}, flops, peak)
    return {"op": "SegmentAttention", "positions": count, "past": 0, **found}


def _model(function: Any, feeds: dict[str, Any], outputs: Sequence[str], **attributes: int) -> bytes:
    """Return a graph of one op of ours with its body, sizes free."""
    inputs = [
        helper.make_tensor_value_info(
            name,
            TensorProto.INT32 if array.dtype == np.int32 else TensorProto.FLOAT,
            [f"{name}{i}" for i in range(array.ndim)],
        )
        for name, array in feeds.items()
    ]
    results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    node = helper.make_node(function.name, list(feeds), list(outputs), domain="vlrt", **attributes)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 18), ("vlrt", 1), ("com.microsoft", 1))]
    graph = helper.make_graph([node], function.name, inputs, results)
    model = helper.make_model(graph, functions=[function.to_function_proto()], opset_imports=opsets, ir_version=10)
    encoded: bytes = model.SerializeToString()
    return encoded


def _compare(
    library: ort_library.Library,
    args: argparse.Namespace,
    model: bytes,
    feeds: dict[str, Any],
    outputs: dict[str, Any],
    flops: int,
    peak: float,
) -> dict[str, Any]:
    """Time the op with and without the library, in turn; the caches are bound in place."""
    calls: dict[str, Callable[[], None]] = {}
    results = {}
    for kind in KINDS:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        options.log_severity_level = 4
        if kind in LEVELS:
            options.add_session_config_entry(ort_library.SIMD, LEVELS[kind])
            options.register_custom_ops_library(str(library.path))
        before = ort_library.num_kernels(library)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        assert (ort_library.num_kernels(library) > before) == (kind in LEVELS), "the other kernel was taken"
        calls[kind] = _bound(session, feeds, outputs)
        calls[kind]()
        results[kind] = outputs["out"].copy()
    scale = np.abs(results["body"]).max()
    for kind, limit in CLOSE.items():
        assert np.abs(results["body"] - results[kind]).max() < limit * scale, f"{kind} differs from the body"
    seconds = _in_turn(calls, args.rounds, CLOCKS[args.clock])
    medians = {kind: seconds[kind]["median"] for kind in KINDS}
    return {
        "flops": flops,
        "seconds": seconds,
        "gflops": {kind: flops / medians[kind] / 1e9 for kind in KINDS},
        "share_of_gemm": {kind: flops / medians[kind] / 1e9 / peak for kind in KINDS},
        "times_faster": {kind: medians["body"] / medians[kind] for kind in LEVELS},
        "bf16_over_fp32": medians["library"] / medians["library bf16"],
    }


def _bound(session: Any, feeds: dict[str, Any], outputs: dict[str, Any]) -> Callable[[], None]:
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in outputs.items():
        binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    return lambda: session.run_with_iobinding(binding)


def _in_turn(
    calls: dict[str, Callable[[], None]], rounds: int, now: Callable[[], float]
) -> dict[str, dict[str, float]]:
    """Return quantiles of the seconds of each call; short ones are repeated within a sample."""
    repeats = {}
    for kind, call in calls.items():
        start = now()
        call()
        repeats[kind] = max(1, round(SECONDS_PER_SAMPLE / (now() - start)))
    samples: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            start = now()
            for _ in range(repeats[kind]):
                call()
            samples[kind].append((now() - start) / repeats[kind])
    return {kind: quantiles(found) for kind, found in samples.items()}


def _gemm_gflops(args: argparse.Namespace, size: int = 1024, rounds: int = 9) -> float:
    """Return what fp32 MatMul of the engine reaches here: the ceiling that attention is held against."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [size, size]) for name in "abc"]
    graph = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["c"])], "gemm", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {name: rng.standard_normal((size, size), np.float32) for name in "ab"}
    samples, now = [], CLOCKS[args.clock]
    for _ in range(rounds):
        start = now()
        session.run(None, feeds)
        samples.append(now() - start)
    return 2 * size**3 / statistics.median(samples) / 1e9


def _answers(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Ask one bundle with and without the library, in turn; the bundle's precision decides which level that is."""
    bundle, clip = Bundle.open(material.bundle(args.shape, args.precision)), material.clip()
    tokenizer = prompt.Tokenizer.open(bundle.path)
    backends = {kind: OrtBackend(bundle, args.threads, library=kind == "library") for kind in ("body", "library")}
    assert backends["library"].kernels.startswith("libvlrt_ort"), backends["library"].kernels
    runtimes = {kind: Runtime(backend, tokenizer) for kind, backend in backends.items()}
    rows = []
    for num_frames in args.frames:
        samples: dict[str, list[Any]] = {kind: [] for kind in backends}
        for i in range(args.rounds + 1):  # the first round warms up
            for kind, runtime in runtimes.items():
                answer = runtime.ask(
                    clip, QUESTION, num_frames=num_frames, max_tokens=ANSWER_TOKENS, min_tokens=ANSWER_TOKENS
                )
                if i:
                    samples[kind].append(answer)
        for kind in backends:
            times = [answer.timings for answer in samples[kind]]
            rows.append(
                {
                    "shape": args.shape,
                    "precision": args.precision,
                    "num_frames": num_frames,
                    "kernels": backends[kind].kernels if kind == "library" else "bodies",
                    "prompt_tokens": samples[kind][-1].usage.prompt_tokens,
                    "seconds": {stage: quantiles([t[stage] for t in times]) for stage in times[0]},
                }
            )
    return rows


def _kernel_table(rows: list[dict[str, Any]], peak: float) -> Table:
    table = Table(title=f"attention, useful GFLOP/s (fp32 MatMul: {peak:.0f})")
    ratios = ("bf16 / fp32", "bf16 / body")
    for name in ("op", "positions", "past", *(f"{kind} ms" for kind in KINDS), *KINDS, *ratios):
        table.add_column(name, justify="left" if name == "op" else "right")
    for row in rows:
        ms = [f"{1e3 * row['seconds'][kind]['median']:.3f}" for kind in KINDS]
        speed = [f"{row['gflops'][kind]:.0f}" for kind in KINDS]
        counts = (str(row["positions"]), str(row["past"]))
        times = (row["bf16_over_fp32"], row["times_faster"]["library bf16"])
        table.add_row(row["op"], *counts, *ms, *speed, *(f"{value:.2f}" for value in times))
    return table


def _answer_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(title="seconds per stage (medians)")
    stages = ("vision", "prefill", "latents", "answer", "total")
    for name in ("shape", "precision", "frames", "tokens", "kernels", *stages):
        table.add_column(name, justify="right")
    for row in rows:
        known = (row["shape"], row["precision"], str(row["num_frames"]), str(row["prompt_tokens"]), row["kernels"])
        table.add_row(*known, *(f"{row['seconds'][stage]['median']:.3f}" for stage in stages))
    return table


assert ops  # its import registers what translate.py names


if __name__ == "__main__":
    main()
