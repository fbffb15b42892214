"""What the tests of libvlrt_ort share: the library is built, an op becomes a graph, a graph is run."""

import ctypes
import platform
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.native import ROOT, build
from vlrt.backends import ort_library
from vlrt.export.linear_functions import FOUR_BIT, INT8, Format, Variant, function
from vlrt.export.translate import RMSNorm

__all__ = ["ROOT", "build", "doubled", "lane_bias", "level", "linear_session", "load", "run", "session", "video_inputs"]
LEVELS = {"x86_64": ("avx512", "avx2", "plain"), "aarch64": ("neon",)}.get(platform.machine(), ("plain",))
EPS = 1e-6  # of norms
VIDEO = ({"q": 4, "k": 4, "v": 4, "cos": 2, "sin": 2, "k_cache": 4, "v_cache": 4, "past_length": 0}, ("out", "k", "v"))
LANE = ({**VIDEO[0], "bias": 4}, VIDEO[1])
SEGMENT = ({"q": 3, "k": 3, "v": 3, "cos": 2, "sin": 2, "cu_seqlens": 1}, ("out",))

OPS = {"VideoAttention": VIDEO, "LaneAttention": LANE, "SegmentAttention": SEGMENT}


@pytest.fixture(params=LEVELS)
def level(request, library) -> str:
    """Each SIMD level that this processor has."""
    exp2 = ctypes.CDLL(str(library.path)).vlrt_exp2
    if exp2(request.param.encode(), None, None, ctypes.c_size_t(0)):
        pytest.skip(f"this processor has no level {request.param}")
    return request.param


def session(library: ort_library.Library, op: str, simd: str = "auto", threads: int = 2) -> Any:
    """A graph of one of our ops, with sizes free."""
    ranks, outputs = OPS[op]
    kinds = {name: TensorProto.INT32 if name in ("past_length", "cu_seqlens") else TensorProto.FLOAT for name in ranks}
    inputs = [helper.make_tensor_value_info(n, kinds[n], [f"{n}{i}" for i in range(r)]) for n, r in ranks.items()]
    values = [helper.make_tensor_value_info(f"{n}_new", TensorProto.FLOAT, None) for n in outputs]
    node = helper.make_node(op, list(ranks), [v.name for v in values], domain="vlrt")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("vlrt", 1)]
    model = helper.make_model(helper.make_graph([node], op, inputs, values), opset_imports=opsets, ir_version=10)
    return load(library, model, {ort_library.SIMD: simd}, threads)


def linear_session(
    library: ort_library.Library | None,
    variant: Variant,
    weights: Format,
    given: dict[str, np.ndarray],
    entries: dict[str, str],
    threads: int = 2,
) -> Any:
    """A graph of one linear op with the weights of `given`, other sizes free; without a library it is the body.

    Scales of int8 and biases are inputs.
    """
    body = function(variant, weights)
    stored = ("q_",) if weights is INT8 else tuple(f"{name}_" for name in weights.inputs)
    constants = [name for name in body.input if name.startswith(stored)]
    inputs = []
    for name in body.input:
        if name not in constants:
            sizes: list[Any] = [f"{name}{i}" for i in range(2 if name in ("x", "residual") else 1)]
            if weights is FOUR_BIT and name.startswith("bias"):  # MatMulNBits wants to know it
                sizes = list(given[name].shape)
            inputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes))
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(variant.num_outputs)]
    attributes: dict[str, Any] = {}
    if weights is FOUR_BIT:
        attributes = {
            "k": given["x"].shape[1],
            **{f"n_{i}": len(given[f"codes_{i}"]) for i in range(variant.num_parts)},
        }
    if variant.norm:
        attributes["eps"] = EPS
    node = helper.make_node(body.name, list(body.input), [o.name for o in outputs], domain="vlrt", **attributes)
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", 18), ("vlrt", 1), ("com.microsoft", 1))]
    held = [numpy_helper.from_array(given[name], name) for name in constants]
    graph = helper.make_graph([node], "linear", inputs, outputs, held)
    functions = [body, RMSNorm.to_function_proto()] if library is None else []
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return load(library, model, entries, threads)


def load(library: ort_library.Library | None, model: Any, entries: dict[str, str], threads: int = 2) -> Any:
    """A session of a model; with a library these entries pick its levels."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if library is not None:
        for entry, level in entries.items():
            options.add_session_config_entry(entry, level)
        options.register_custom_ops_library(str(library.path))
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(made: Any, *tensors: torch.Tensor) -> list[torch.Tensor]:
    names = [given.name for given in made.get_inputs()]
    feeds = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
    return [torch.from_numpy(array) for array in made.run(None, feeds)]


def doubled(tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def video_inputs(num_new: int, past: int, heads: int, kv_heads: int, dim: int, batch: int = 1):
    """Random inputs of `video_attention`; cache slots that are not in use hold NaN."""
    generator = torch.Generator().manual_seed(num_new + past)
    slots = past + num_new + 5

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    q, k, v = (random(batch, num_new, h, dim) for h in (heads, kv_heads, kv_heads))
    angles = 3 * random(slots, dim // 2)
    caches = [random(batch, kv_heads, slots, dim) for _ in range(2)]
    for cache in caches:
        cache[:, :, past:] = torch.nan
    return q, k, v, angles.cos(), angles.sin(), *caches, torch.tensor(past, dtype=torch.int32)


def lane_bias(num_new: int, past: int, first: int) -> torch.Tensor:
    """Bias [1, 1, S, past + S] of three lanes in turn: they share the first slots and hide those of others."""
    lanes = torch.arange(past + num_new) % 3
    hidden = (lanes[past:, None] != lanes) & (torch.arange(past + num_new) >= first)
    generator = torch.Generator().manual_seed(num_new)
    return torch.randn(hidden.shape, generator=generator).masked_fill(hidden, -torch.inf)[None, None]
