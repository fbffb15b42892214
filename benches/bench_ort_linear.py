"""int8 linear layers on the CPU: libvlrt_ort beside the function bodies of a bundle, in steps, prefill and lm_head.

    python -m benches.bench_ort_linear [--rounds 9] [--threads 2] [--shape small]

One bundle, two backends in turn: with the library its kernels run, attention included, without it the bodies. Hidden
states are compared before anything is timed. A step is held against the bytes of its weights at the read bandwidth of
the same run, prefill against DynamicQuantizeMatMul of the same run on a product of one shape.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from benches import machine, material
from benches.bench_stages import quantiles
from vlrt.backends import ort_library
from vlrt.backends.ort import OrtBackend, num_usable_cores
from vlrt.bundle import Bundle
from vlrt.positions import mrope_cos_sin

ROWS = (1, 8, 64, 512)  # positions that one pass of the decoder takes
PAST = 600  # positions before them
READ_BYTES = 512 * 1024**2  # more than a last-level cache lends to one of its users
KINDS = ("body", "library")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(prog="benches.bench_ort_linear", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=num_usable_cores())
    parser.add_argument("--shape", default="small")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    library = ort_library.find()
    if isinstance(library, str):
        raise SystemExit(library)
    bundle = Bundle.open(material.bundle(args.shape, "int8"))
    read, gemm = _read_gbytes(args.threads, args.rounds), _gemm_gops(args.threads, args.rounds)
    rows = _passes(bundle, args)
    place = Path(__file__).parent / "results" / machine.describe()["name"] / "ort_linear.json"
    out = machine.write_result(
        "ort_linear",
        argv if argv is not None else sys.argv[1:],
        args.out or place,
        int8=library.int8,
        threads=args.threads,
        rounds=args.rounds,
        read_gbytes_per_second=read,
        gemm_gops=gemm,
        passes=rows,
    )
    console = Console(width=140)
    console.print(_table(rows, read, gemm))
    console.print(out)


def _passes(bundle: Bundle, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Time passes of the decoder and of lm_head, in turn."""
    backends = {kind: OrtBackend(bundle, args.threads, library=kind == "library") for kind in KINDS}
    cfg, rng = bundle.model.decoder, np.random.default_rng(0)
    num_bytes = {name: bundle.manifest.files[f"{name}.bin"].num_bytes for name in ("decoder", "lm_head")}
    rows = []
    for count in ROWS:
        embeds = rng.standard_normal((PAST + count, cfg.hidden_size), np.float32)
        cos, sin = mrope_cos_sin(np.tile(np.arange(PAST + count), (3, 1)), cfg)
        calls = {kind: _pass(backend, embeds, cos, sin) for kind, backend in backends.items()}
        rows.append(_row("decoder", count, calls, num_bytes["decoder"], args.rounds))
    hidden = rng.standard_normal((1, cfg.hidden_size), np.float32)
    heads = {kind: lambda backend=backend: backend.logits(hidden) for kind, backend in backends.items()}
    rows.append(_row("lm_head", 1, heads, num_bytes["lm_head"], args.rounds))
    return rows


def _pass(backend: OrtBackend, embeds: Any, cos: Any, sin: Any) -> Callable[[], Any]:
    """Return a pass of the decoder over what stands behind PAST positions, again and again in the same slots."""
    cache = backend.prepare(len(embeds))
    backend.decode(cache, embeds[:PAST], cos[:PAST], sin[:PAST])

    def call() -> Any:
        hidden = backend.decode(cache, embeds[PAST:], cos[PAST:], sin[PAST:])
        cache.rewind(len(hidden))
        return hidden

    return call


def _row(graph: str, count: int, calls: dict[str, Callable[[], Any]], num_bytes: int, rounds: int) -> dict[str, Any]:
    out = {kind: call() for kind, call in calls.items()}
    error = float(np.linalg.norm(out["library"] - out["body"]) / np.linalg.norm(out["body"]))
    assert error < 0.1, f"{graph}: library and body differ by {error:.3f}"
    samples: dict[str, list[float]] = {kind: [] for kind in calls}
    for _ in range(rounds):
        for kind, call in calls.items():
            start = time.perf_counter()
            call()
            samples[kind].append(time.perf_counter() - start)
    return {
        "graph": graph,
        "positions": count,
        "weight_bytes": num_bytes,
        "ops": 2 * num_bytes * count,
        "difference": error,
        "seconds": {kind: quantiles(found) for kind, found in samples.items()},
    }


def _read_gbytes(threads: int, rounds: int) -> float:
    """Return GB/s at which this many threads read memory."""
    parts = np.array_split(np.ones(READ_BYTES // 8, np.int64), threads)
    samples = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(rounds):
            start = time.perf_counter()
            list(pool.map(np.max, parts))
            samples.append(time.perf_counter() - start)
    return READ_BYTES / statistics.median(samples) / 1e9


def _gemm_gops(threads: int, rounds: int, m: int = 2048, k: int = 896, n: int = 4864) -> float:
    """Return what DynamicQuantizeMatMul of the engine reaches here."""
    rng = np.random.default_rng(0)
    stored = {"q": rng.integers(-127, 128, (k, n), np.int8), "scale": np.full(n, 1e-3, np.float32)}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy")
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "q", "scale"], ["y"], domain="com.microsoft")
    weights = [numpy_helper.from_array(array, name) for name, array in stored.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "gemm", [x], [y], weights), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {"x": rng.standard_normal((m, k), np.float32)}
    samples = []
    for _ in range(rounds):
        start = time.perf_counter()
        session.run(None, feeds)
        samples.append(time.perf_counter() - start)
    return 2 * m * k * n / statistics.median(samples) / 1e9


def _table(rows: list[dict[str, Any]], read: float, gemm: float) -> Table:
    table = Table(title=f"int8 layers (memory is read at {read:.1f} GB/s, DynamicQuantizeMatMul: {gemm:.0f} GOP/s)")
    for name in (
        "graph",
        "positions",
        "body ms",
        "library ms",
        "times faster",
        "share of reading",
        "share of products",
    ):
        table.add_column(name, justify="left" if name == "graph" else "right")
    for row in rows:
        body, ours = (row["seconds"][kind]["median"] for kind in KINDS)
        shares = (row["weight_bytes"] / ours / 1e9 / read, row["ops"] / ours / 1e9 / gemm)
        table.add_row(
            *(row["graph"], str(row["positions"]), f"{1e3 * body:.1f}", f"{1e3 * ours:.1f}", f"{body / ours:.2f}"),
            *(f"{share:.2f}" for share in shares),
        )
    return table


if __name__ == "__main__":
    main()
