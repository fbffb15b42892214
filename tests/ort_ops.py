"""What the tests of libvlrt_ort share: the library is built, an op becomes a graph, a graph is run."""

from typing import Any

import onnxruntime
import torch
from onnx import TensorProto, helper

from tests.native import ROOT, build
from vlrt.backends import ort_library

__all__ = ["ROOT", "build", "doubled", "lane_bias", "run", "session", "video_inputs"]
VIDEO = ({"q": 4, "k": 4, "v": 4, "cos": 2, "sin": 2, "k_cache": 4, "v_cache": 4, "past_length": 0}, ("out", "k", "v"))
LANE = ({**VIDEO[0], "bias": 4}, VIDEO[1])
SEGMENT = ({"q": 3, "k": 3, "v": 3, "cos": 2, "sin": 2, "cu_seqlens": 1}, ("out",))

OPS = {"VideoAttention": VIDEO, "LaneAttention": LANE, "SegmentAttention": SEGMENT}


def session(library: ort_library.Library, op: str, simd: str = "auto", threads: int = 2) -> Any:
    """A graph of one of our ops, with sizes free."""
    ranks, outputs = OPS[op]
    kinds = {name: TensorProto.INT32 if name in ("past_length", "cu_seqlens") else TensorProto.FLOAT for name in ranks}
    inputs = [helper.make_tensor_value_info(n, kinds[n], [f"{n}{i}" for i in range(r)]) for n, r in ranks.items()]
    values = [helper.make_tensor_value_info(f"{n}_new", TensorProto.FLOAT, None) for n in outputs]
    node = helper.make_node(op, list(ranks), [v.name for v in values], domain="vlrt")
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("vlrt", 1)]
    model = helper.make_model(helper.make_graph([node], op, inputs, values), opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry(ort_library.SIMD, simd)
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
