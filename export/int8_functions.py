"""The ONNX functions that int8 linear layers become: names, inputs and bodies of operators that stock ONNX Runtime has.

An engine with kernels of these names (`libvlrt_ort`, kernels/ort/linear_ops.h) takes those. A body divides each row by
its own largest magnitude before DynamicQuantizeMatMul, which quantises per tensor, and multiplies it back after: its
one scale then serves every token, at its speed. Layers that share an input share that division. Knows no weights.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx import FunctionProto, NodeProto, helper, numpy_helper

from vlrt.export.translate import DOMAIN, OPSET

TINY = np.array(1e-20, np.float32)  # a row of zeros is divided by it
ENGINE = "com.microsoft"


@dataclass(frozen=True)
class Variant:
    """One function: `x`, then weight, scale and perhaps bias of each part, then perhaps a residual, in this order.

    Attributes:
        name: of the operator.
        num_parts: weight matrices that read the same x.
        bias: whether each part has one.
        gated: two parts, `silu(part 0) * part 1` is the output; else each part is one.
        residual: whether a tensor is added to the output.
    """

    name: str
    num_parts: int = 1
    bias: bool = False
    gated: bool = False
    residual: bool = False

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return 1 if self.gated else self.num_parts


VARIANTS = (
    Variant("QuantizedLinear"),
    Variant("QuantizedLinearBias", bias=True),
    Variant("QuantizedLinearAdd", residual=True),
    Variant("QuantizedLinearBiasAdd", bias=True, residual=True),
    Variant("QuantizedProjections", 3, bias=True),
    Variant("QuantizedSwiGLU", 2, gated=True),
    Variant("QuantizedSwiGLUBias", 2, bias=True, gated=True),
)


def find(num_parts: int, *, bias: bool, gated: bool = False, residual: bool = False) -> Variant | None:
    """Return the variant that is like this; None where there is none."""
    wanted = (num_parts, bias, gated, residual)
    return next((v for v in VARIANTS if (v.num_parts, v.bias, v.gated, v.residual) == wanted), None)


def attach(model: ir.Model) -> None:
    """Add to a model the bodies of the functions that its graph calls."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for variant in VARIANTS:
        if variant.name in called:
            body = ir.serde.deserialize_function(function(variant))
            model.functions[body.identifier()] = body
            model.opset_imports[DOMAIN] = 1
            model.opset_imports[ENGINE] = 1


def function(variant: Variant) -> FunctionProto:
    """Return a variant with its body."""
    node = helper.make_node
    nodes = [
        node("Constant", [], ["last"], value_ints=[-1]),
        node("Constant", [], ["tiny"], value=numpy_helper.from_array(TINY)),
        node("Abs", ["x"], ["magnitude"]),
        node("ReduceMax", ["magnitude", "last"], ["largest"], keepdims=1),
        node("Max", ["largest", "tiny"], ["row_max"]),
        node("Div", ["x", "row_max"], ["rows"]),
    ]
    inputs, outs = ["x"], []
    for part in range(variant.num_parts):
        q, scale, bias, out = (f"{name}_{part}" for name in ("q", "scale", "bias", "out"))
        inputs += [q, scale, *([bias] if variant.bias else [])]
        nodes.append(node("DynamicQuantizeMatMul", ["rows", q, scale], [f"product_{part}"], domain=ENGINE))
        product = f"linear_{part}" if variant.bias else out
        nodes.append(node("Mul", [f"product_{part}", "row_max"], [product]))
        if variant.bias:
            nodes.append(node("Add", [product, bias], [out]))
        outs.append(out)
    if variant.gated:
        gate, up = outs
        nodes += [
            node("Sigmoid", [gate], ["sigmoid"]),
            node("Mul", [gate, "sigmoid"], ["silu"]),
            node("Mul", ["silu", up], ["gated"]),
        ]
        outs = ["gated"]
    if variant.residual:
        inputs.append("residual")
        nodes.append(node("Add", ["residual", *outs], ["sum"]))
        outs = ["sum"]
    return _named(variant, inputs, outs, nodes)


def _named(variant: Variant, inputs: list[str], outs: list[str], nodes: list[NodeProto]) -> FunctionProto:
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(ENGINE, 1)]
    return helper.make_function(DOMAIN, variant.name, inputs, outs, nodes, opsets)
