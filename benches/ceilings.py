"""What this machine can do: its fastest matrix product per dtype by the libraries at hand, and its memory's rates.

    python -m benches.ceilings THREADS [--tiny]

Prints JSON. Runs in a process of its own, since it loads torch. Sizes are those of `small`'s prefill and a cube.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

from benches import timing

PRODUCTS = ((2048, 896, 4864), (2048, 4864, 896), (2048, 2048, 2048))  # M, K, N
TINY_PRODUCTS = ((16, 32, 32),)
READ_BYTES, TINY_READ_BYTES = 1024**3, 2**20
Call = Callable[[], Any]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benches.ceilings", description=__doc__.split("\n", 1)[0])
    parser.add_argument("threads", type=int)
    parser.add_argument("--tiny", action="store_true", help="sizes that say nothing, to see that it runs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    products = TINY_PRODUCTS if args.tiny else PRODUCTS
    with torch.inference_mode():
        found = {"gemm": gemm(products, args.threads), "memory": memory(TINY_READ_BYTES if args.tiny else READ_BYTES)}
    print(json.dumps(found))


def gemm(products: tuple[tuple[int, int, int], ...], threads: int) -> dict[str, Any]:
    """Return, per dtype, `best` operations per second and the cases that it is the best of."""
    makers = {"fp32": _fp32, "bf16": _bf16, "int8": _int8}
    found: dict[str, Any] = {}
    for dtype, make in makers.items():
        cases = []
        for m, k, n in products:
            for library, call in make(m, k, n, threads):
                seconds = timing.measure(call, "cpu", seconds=0.4)
                cases.append({"library": library, "mkn": [m, k, n], "seconds": seconds})
                cases[-1]["flops_per_second"] = 2.0 * m * k * n / seconds["median"]
        best = max(cases, key=lambda case: case["flops_per_second"])
        found[dtype] = {"best": best["flops_per_second"], "by": best["library"], "cases": cases}
    return found


def memory(size: int) -> dict[str, Any]:
    """Return bytes per second of reading `size` bytes, and of copying them, counted as read and written."""
    source = torch.ones(size // 4)
    whole, target = source.view(torch.int64), torch.empty_like(source)
    matrix, vector = source.view(-1, 1024), torch.ones(1024)
    reads = {"sum": whole.sum, "amax": lambda: matrix.amax(1), "matrix times vector": lambda: matrix @ vector}
    timed = {name: timing.measure(call, "cpu", seconds=1.0) for name, call in reads.items()}
    copied = timing.measure(lambda: target.copy_(source), "cpu", seconds=1.0)
    best = min(timed, key=lambda name: timed[name]["median"])
    seconds = {**timed, "copy": copied}
    return {"read": size / timed[best]["median"], "by": best, "copy": 2 * size / copied["median"], "seconds": seconds}


def _fp32(m: int, k: int, n: int, threads: int) -> Iterator[tuple[str, Call]]:
    x, weight = torch.randn(m, k), torch.randn(n, k)
    yield "torch", lambda: torch.nn.functional.linear(x, weight)
    yield "onnxruntime MatMul", _graph("MatMul", x.numpy(), {"w": weight.numpy().T.copy()}, threads)


def _bf16(m: int, k: int, n: int, threads: int) -> Iterator[tuple[str, Call]]:
    x, weight = (torch.randn(rows, k).bfloat16() for rows in (m, n))
    yield "torch", lambda: torch.nn.functional.linear(x, weight)


def _int8(m: int, k: int, n: int, threads: int) -> Iterator[tuple[str, Call]]:
    """Quantising the activations is part of the second, as it is of a layer; the others take them quantised."""
    random = np.random.default_rng(0)
    x, weight = (random.integers(-127, 128, shape).astype(np.int8) for shape in ((m, k), (k, n)))
    scale = np.full(n, 0.01, np.float32)
    ours, theirs = torch.from_numpy(x), torch.from_numpy(weight)
    yield "torch _int_mm", lambda: torch._int_mm(ours, theirs)
    given = {"w": weight, "scale": scale}
    yield "onnxruntime DynamicQuantizeMatMul", _graph("DynamicQuantizeMatMul", x.astype(np.float32), given, threads)
    yield "onnxruntime MatMulInteger", _graph("MatMulInteger", (x.view(np.uint8)), {"w": weight}, threads)


def _graph(op: str, x: Any, constants: dict[str, Any], threads: int) -> Call:
    """Return a run of one operator of ONNX Runtime on an input and constants."""
    kinds = {"float32": TensorProto.FLOAT, "uint8": TensorProto.UINT8}
    domain = "com.microsoft" if op == "DynamicQuantizeMatMul" else ""
    made = helper.make_graph(
        [helper.make_node(op, ["x", *constants], ["y"], domain=domain)],
        op,
        [helper.make_tensor_value_info("x", kinds[x.dtype.name], x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.INT32 if op == "MatMulInteger" else TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, {"x": x})


if __name__ == "__main__":
    main()
