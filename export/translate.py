"""From PyTorch ops to ONNX: the vlrt ops become model-local functions, linear layers become a placeholder.

A function `vlrt::Name` has a body of operators that stock ONNX Runtime brings, so no custom library is needed; an
engine with kernels of its own takes the name and leaves the body. `vlrt::Linear` is no function: `quantize.py` lowers
it to a precision. Knows operators, neither weights nor graphs.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript import FLOAT, INT32, script, values
from onnxscript import opset18 as op

import vlrt.kernels.schema  # noqa: F401 - registers the ops that TABLE names
from vlrt.export import branches

OPSET = 18  # what torch.onnx emits without converting, which would inline the functions
DOMAIN = "vlrt"

_vlrt = values.Opset(DOMAIN, 1)
_ort = values.Opset("com.microsoft", 1)


@script(_vlrt)
def VideoAttention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    cos: FLOAT,
    sin: FLOAT,
    k_cache: FLOAT,
    v_cache: FLOAT,
    past_length: INT32,
    num_heads: int,
    kv_num_heads: int,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """`kernels.reference.video_attention`; the caches are written in place where the caller binds them so."""
    shape = op.Shape(q)
    num_new = op.Cast(op.Gather(shape, op.Constant(value_ints=[1])), to=6)
    total = op.Add(op.Reshape(past_length, op.Constant(value_ints=[1])), num_new)
    last = op.Sub(total, op.Cast(op.Constant(value_ints=[1]), to=6))
    flat = op.Constant(value_ints=[0, 0, -1])
    out, k_new, v_new = _ort.GroupQueryAttention(
        op.Reshape(q, flat),
        op.Reshape(k, flat),
        op.Reshape(v, flat),
        k_cache,
        v_cache,
        last,
        total,
        cos,
        sin,
        num_heads=num_heads,
        kv_num_heads=kv_num_heads,
        do_rotary=1,
    )
    return op.Reshape(out, shape), k_new, v_new


@script(_vlrt)
def LaneAttention(
    q: FLOAT,
    k: FLOAT,
    v: FLOAT,
    cos: FLOAT,
    sin: FLOAT,
    k_cache: FLOAT,
    v_cache: FLOAT,
    past_length: INT32,
    bias: FLOAT,
    num_heads: int,
    kv_num_heads: int,
) -> tuple[FLOAT, FLOAT, FLOAT]:
    """`kernels.reference.video_attention` with a bias, where it has elements: adding zeros would take a tenth more.

    Caches are written in place through the branches too.
    """
    if op.Size(bias) == op.Constant(value_int=0):
        out, k_new, v_new = VideoAttention(
            q, k, v, cos, sin, k_cache, v_cache, past_length, num_heads=num_heads, kv_num_heads=kv_num_heads
        )
    else:
        shape = op.Shape(q)
        num_new = op.Cast(op.Gather(shape, op.Constant(value_ints=[1])), to=6)
        total = op.Add(op.Reshape(past_length, op.Constant(value_ints=[1])), num_new)
        last = op.Sub(total, op.Cast(op.Constant(value_ints=[1]), to=6))
        flat = op.Constant(value_ints=[0, 0, -1])
        mixed, k_new, v_new = _ort.GroupQueryAttention(
            op.Reshape(q, flat),
            op.Reshape(k, flat),
            op.Reshape(v, flat),
            k_cache,
            v_cache,
            last,
            total,
            cos,
            sin,
            None,
            bias,
            num_heads=num_heads,
            kv_num_heads=kv_num_heads,
            do_rotary=1,
        )
        out = op.Reshape(mixed, shape)
    return out, k_new, v_new


@script(_vlrt)
def SegmentAttention(q: FLOAT, k: FLOAT, v: FLOAT, cos: FLOAT, sin: FLOAT, cu_seqlens: INT32, num_heads: int) -> FLOAT:
    """`kernels.reference.segment_attention`: segments of one length as a batch, others padded to the longest."""
    shape = op.Shape(q)
    zero = op.Constant(value_int=0)
    one = op.Constant(value_int=1)
    zeros = op.Constant(value_ints=[0])
    ones = op.Constant(value_ints=[1])
    rest = op.Constant(value_ints=[-1])
    num_tokens = op.Gather(shape, zero)
    row = op.Concat(ones, op.Reshape(num_tokens, ones), rest, axis=0)  # [1, N, H * D]
    positions = op.Unsqueeze(op.Range(zero, num_tokens, one), zeros)
    q_flat = op.Squeeze(_ort.RotaryEmbedding(op.Reshape(q, row), positions, cos, sin), zeros)
    k_flat = op.Squeeze(_ort.RotaryEmbedding(op.Reshape(k, row), positions, cos, sin), zeros)
    v_flat = op.Squeeze(op.Reshape(v, row), zeros)
    bounds = op.Cast(cu_seqlens, to=7)
    starts = op.Slice(bounds, zeros, rest, zeros)
    lengths = op.Sub(op.Slice(bounds, ones, op.Constant(value_ints=[2147483647]), zeros), starts)
    longest = op.ReduceMax(lengths, keepdims=0)
    shortest = op.ReduceMin(lengths, keepdims=0)
    if shortest == longest:
        batch = op.Concat(op.Shape(lengths), op.Reshape(longest, ones), rest, axis=0)
        mixed = _ort.MultiHeadAttention(
            op.Reshape(q_flat, batch), op.Reshape(k_flat, batch), op.Reshape(v_flat, batch), num_heads=num_heads
        )
        out = op.Reshape(mixed, shape)
    else:
        steps = op.Unsqueeze(op.Range(zero, longest, one), zeros)
        inside = op.Less(steps, op.Unsqueeze(lengths, ones))  # [segments, longest]
        index = op.Where(inside, op.Add(op.Unsqueeze(starts, ones), steps), zero)
        mask = op.Cast(inside, to=6)
        padded = _ort.MultiHeadAttention(
            op.Gather(q_flat, index),
            op.Gather(k_flat, index),
            op.Gather(v_flat, index),
            None,
            mask,
            num_heads=num_heads,
        )
        width = op.Slice(op.Shape(q_flat), ones, op.Constant(value_ints=[2]), zeros)
        tokens = op.Reshape(padded, op.Concat(rest, width, axis=0))
        out = op.Reshape(op.Compress(tokens, op.Reshape(inside, rest), axis=0), shape)
    return out


@script(_vlrt)
def LatentInjection(
    h: FLOAT,
    norm_in: FLOAT,
    fc1: FLOAT,
    fc2: FLOAT,
    q_proj: FLOAT,
    memory_k: FLOAT,
    memory_v: FLOAT,
    alpha: FLOAT,
    norm_out: FLOAT,
    rho: FLOAT,
    num_heads: int,
    eps: float,
) -> FLOAT:
    """`kernels.reference.latent_injection`."""
    last = op.Constant(value_ints=[-1])
    two = op.Constant(value_float=2.0)
    epsilon = op.Constant(value_float=eps)
    u = op.Mul(op.Div(h, op.Sqrt(op.Add(op.ReduceMean(op.Pow(h, two), last), epsilon))), norm_in)
    inner = op.MatMul(u, op.Transpose(fc1, perm=[1, 0]))
    mlp = op.MatMul(op.Mul(inner, op.Sigmoid(inner)), op.Transpose(fc2, perm=[1, 0]))
    query = op.MatMul(u, op.Transpose(q_proj, perm=[1, 0]))
    seen = _ort.MultiHeadAttention(query, memory_k, memory_v, num_heads=num_heads)
    mixed = op.Add(op.Add(u, mlp), op.Mul(op.Tanh(alpha), seen))
    scale = op.Sqrt(op.Add(op.ReduceMean(op.Pow(mixed, two), last), epsilon))
    return op.Mul(rho, op.Mul(op.Div(mixed, scale), norm_out))


@script(_vlrt)
def RMSNorm(x: FLOAT, weight: FLOAT, eps: float) -> FLOAT:
    """The pattern that ONNX Runtime fuses into SimplifiedLayerNormalization, and others run as it is."""
    mean = op.ReduceMean(op.Pow(x, op.Constant(value_float=2.0)), op.Constant(value_ints=[-1]))
    scale = op.Sqrt(op.Add(mean, op.Constant(value_float=eps)))
    return op.Mul(op.Div(x, scale), weight)


FUNCTIONS = (VideoAttention, LaneAttention, SegmentAttention, LatentInjection, RMSNorm)
_CALLS = {"LaneAttention": "VideoAttention"}


def _schema(name: str, inputs: list[str], outputs: list[str], attributes: dict[str, str]) -> OpSchema:
    """Describe an operator of ours, so that translations can emit it as a node without its body."""
    optional = OpSchema.FormalParameterOption.Optional
    single = OpSchema.FormalParameterOption.Single
    kinds = {"int": OpSchema.AttrType.INT, "float": OpSchema.AttrType.FLOAT}
    return OpSchema(
        name,
        DOMAIN,
        1,
        inputs=[
            OpSchema.FormalParameter(
                i.rstrip("?"),
                "I" if i in ("past_length", "cu_seqlens") else "T",
                param_option=optional if i.endswith("?") else single,
            )
            for i in inputs
        ],
        outputs=[OpSchema.FormalParameter(o, "T") for o in outputs],
        type_constraints=[("T", ["tensor(float)"], ""), ("I", ["tensor(int32)"], "")],
        attributes=[OpSchema.Attribute(a, kinds[kind], "", required=True) for a, kind in attributes.items()],
    )


def _node(schema: OpSchema) -> Callable[..., Any]:
    """Return a callable that emits one node of a schema into the graph under construction."""
    emit: Callable[..., Any] = values.Op(_vlrt, schema.name, schema)
    return emit


_ATTENTION = ["q", "k", "v", "cos", "sin"]
_lane_attention = _node(
    _schema(
        "LaneAttention",
        [*_ATTENTION, "k_cache", "v_cache", "past_length", "bias"],
        ["out", "k_new", "v_new"],
        {"num_heads": "int", "kv_num_heads": "int"},
    )
)
_segment_attention = _node(_schema("SegmentAttention", [*_ATTENTION, "cu_seqlens"], ["out"], {"num_heads": "int"}))
_latent_injection = _node(
    _schema(
        "LatentInjection",
        ["h", "norm_in", "fc1", "fc2", "q_proj", "memory_k", "memory_v", "alpha", "norm_out", "rho"],
        ["latents"],
        {"num_heads": "int", "eps": "float"},
    )
)
_rms_norm = _node(_schema("RMSNorm", ["x", "weight"], ["out"], {"eps": "float"}))
_linear = _node(_schema("Linear", ["x", "weight", "bias?"], ["out"], {}))


def _translate_video_attention(
    q: Any, k: Any, v: Any, cos: Any, sin: Any, k_cache: Any, v_cache: Any, past_length: Any, bias: Any
) -> Any:
    return _lane_attention(
        q, k, v, cos, sin, k_cache, v_cache, past_length, bias, num_heads=q.shape[2], kv_num_heads=k.shape[2]
    )


def _translate_segment_attention(q: Any, k: Any, v: Any, cos: Any, sin: Any, cu_seqlens: Any) -> Any:
    return _segment_attention(q, k, v, cos, sin, cu_seqlens, num_heads=q.shape[1])


def _translate_latent_injection(
    h: Any,
    norm_in: Any,
    fc1: Any,
    fc2: Any,
    q_proj: Any,
    memory_k: Any,
    memory_v: Any,
    alpha: Any,
    norm_out: Any,
    rho: Any,
    num_heads: int,
    eps: float,
) -> Any:
    return _latent_injection(
        h, norm_in, fc1, fc2, q_proj, memory_k, memory_v, alpha, norm_out, rho, num_heads=num_heads, eps=eps
    )


def _translate_rms_norm(x: Any, weight: Any, eps: float) -> Any:
    return _rms_norm(x, weight, eps=eps)


def _translate_linear(x: Any, weight: Any, bias: Any = None) -> Any:
    return _linear(x, weight, bias)


TABLE: dict[Any, Callable[..., Any]] = {
    torch.ops.vlrt.video_attention.default: _translate_video_attention,
    torch.ops.vlrt.segment_attention.default: _translate_segment_attention,
    torch.ops.vlrt.latent_injection.default: _translate_latent_injection,
    torch.ops.vlrt.rms_norm.default: _translate_rms_norm,
    torch.ops.aten.linear.default: _translate_linear,
}


def attach_functions(model: ir.Model) -> None:
    """Add to a model the bodies of the vlrt functions that its graph calls."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    called |= {_CALLS[name] for name in called if name in _CALLS}
    for function in FUNCTIONS:
        if function.name in called:
            body = ir.serde.deserialize_function(branches.order_outputs(function.to_function_proto()))
            body.opset_imports["com.microsoft"] = body.opset_imports[DOMAIN] = 1  # also of what branches alone name
            model.functions[body.identifier()] = body
            model.opset_imports["com.microsoft"] = 1
    model.opset_imports[DOMAIN] = 1
    model.opset_imports[""] = OPSET
