"""The ONNX functions that linear layers become: names, inputs and bodies of operators that stock ONNX Runtime has.

An engine with kernels of these names (`libvlrt_ort`, kernels/ort/linear_ops.h) takes those. Bodies: fp32 is MatMul,
int4 is MatMulNBits. int8 divides each row by its own largest magnitude before DynamicQuantizeMatMul, which quantises
per tensor, and multiplies it back after: its one scale then serves every token, at its speed, and layers that share an
input share that division. Some take in the norm before them, or all of an MLP. Knows no weights.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx import AttributeProto, FunctionProto, NodeProto, helper, numpy_helper

from vlrt.export import int4
from vlrt.export.translate import DOMAIN, OPSET

TINY = np.array(1e-20, np.float32)  # a row of zeros is divided by it
ENGINE = "com.microsoft"


@dataclass(frozen=True)
class Format:
    """How the weights of a layer are stored.

    Attributes:
        prefix: of the names of functions.
        inputs: of each part, before perhaps a bias.
    """

    prefix: str
    inputs: tuple[str, ...]


FLOAT = Format("Float", ("weight",))
INT8 = Format("Quantized", ("q", "scale"))
FOUR_BIT = Format("FourBit", ("codes", "scales", "zeros", "scale"))  # the body does without `scale`, of whole columns
FORMATS = (FLOAT, INT8, FOUR_BIT)


@dataclass(frozen=True)
class Variant:
    """One function: `x`, perhaps a norm, then weights and perhaps bias of each part, then perhaps a residual.

    Attributes:
        suffix: of the function's name, behind the format's.
        num_parts: weight matrices.
        bias: whether each part has one.
        gated: `silu(part 0) * part 1` is the output; else each part, which all read x, is one.
        residual: whether a tensor is added to the output.
        norm: whether the parts read `RMSNorm(x)`, whose weight follows x and whose eps is an attribute.
        down: whether a third part reads what is gated, and x is added to what it makes: the output.
    """

    suffix: str
    num_parts: int = 1
    bias: bool = False
    gated: bool = False
    residual: bool = False
    norm: bool = False
    down: bool = False

    @property
    def num_outputs(self) -> int:
        """Number of outputs."""
        return 1 if self.gated else self.num_parts

    def name(self, weights: Format) -> str:
        """Return the operator's name."""
        return weights.prefix + self.suffix


VARIANTS = (
    Variant("Linear"),
    Variant("LinearBias", bias=True),
    Variant("LinearAdd", residual=True),
    Variant("LinearBiasAdd", bias=True, residual=True),
    Variant("Projections", 3, bias=True),
    Variant("SwiGLU", 2, gated=True),
    Variant("SwiGLUBias", 2, bias=True, gated=True),
)
NORMED = (  # of int8 and int4 alone, whose kernels gain by it
    Variant("NormProjections", 3, bias=True, norm=True),
    Variant("MLP", 3, gated=True, norm=True, down=True),
    Variant("MLPBias", 3, bias=True, gated=True, norm=True, down=True),
)


def variants(weights: Format) -> tuple[Variant, ...]:
    """Return what there is in a format."""
    return VARIANTS if weights is FLOAT else (*VARIANTS, *NORMED)


def find(
    num_parts: int, *, bias: bool, gated: bool = False, residual: bool = False, norm: bool = False, down: bool = False
) -> Variant | None:
    """Return the variant that is like this; None where there is none."""
    wanted = (num_parts, bias, gated, residual, norm, down)
    every = (*VARIANTS, *NORMED)
    return next((v for v in every if (v.num_parts, v.bias, v.gated, v.residual, v.norm, v.down) == wanted), None)


def attach(model: ir.Model) -> None:
    """Add to a model the bodies of the functions that its graph calls."""
    called = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for weights in FORMATS:
        for variant in variants(weights):
            if variant.name(weights) in called:
                body = ir.serde.deserialize_function(function(variant, weights))
                model.functions[body.identifier()] = body
                model.opset_imports[DOMAIN] = 1
                model.opset_imports[ENGINE] = 1


def function(variant: Variant, weights: Format) -> FunctionProto:
    """Return a variant with its body."""
    node = helper.make_node
    inputs, attributes, nodes = ["x"], [], []
    read = "x"
    if variant.norm:
        inputs.append("norm")
        attributes.append("eps")
        read = "normed"
        nodes.append(_with_attributes(node("RMSNorm", ["x", "norm"], [read], domain=DOMAIN), {"eps": "eps"}))
    if weights is FOUR_BIT:
        attributes += ["k", *(f"n_{part}" for part in range(variant.num_parts))]
    names = [
        [f"{name}_{part}" for name in (*weights.inputs, *(["bias"] if variant.bias else []))]
        for part in range(variant.num_parts)
    ]
    inputs += [name for of_part in names for name in of_part]
    make = _PRODUCTS[weights]
    together = range(variant.num_parts - variant.down)
    nodes += _rows(read) if weights is INT8 else []
    for part in together:
        nodes += make(part, read, "k", names[part], variant.bias)
    outs = [f"out_{part}" for part in together]
    if variant.gated:
        gate, up = outs
        nodes += [
            node("Sigmoid", [gate], ["sigmoid"]),
            node("Mul", [gate, "sigmoid"], ["silu"]),
            node("Mul", ["silu", up], ["gated"]),
        ]
        outs = ["gated"]
    if variant.down:
        last = variant.num_parts - 1
        nodes += _rows("gated") if weights is INT8 else []
        nodes += make(last, "gated", "n_0", names[last], variant.bias)
        nodes.append(node("Add", ["x", f"out_{last}"], ["sum"]))
        outs = ["sum"]
    if variant.residual:
        inputs.append("residual")
        nodes.append(node("Add", ["residual", *outs], ["sum"]))
        outs = ["sum"]
    domains = (("", OPSET), (ENGINE, 1), (DOMAIN, 1))
    opsets = [helper.make_opsetid(*domain) for domain in domains[: 3 if variant.norm else 2]]
    return helper.make_function(DOMAIN, variant.name(weights), inputs, outs, nodes, opsets, attributes)


def _rows(x: str) -> list[NodeProto]:
    """Return what makes of x its rows, each divided by its largest magnitude, and these."""
    node = helper.make_node
    return [
        node("Constant", [], [f"{x}_last"], value_ints=[-1]),
        node("Constant", [], [f"{x}_tiny"], value=numpy_helper.from_array(TINY)),
        node("Abs", [x], [f"{x}_magnitude"]),
        node("ReduceMax", [f"{x}_magnitude", f"{x}_last"], [f"{x}_largest"], keepdims=1),
        node("Max", [f"{x}_largest", f"{x}_tiny"], [f"{x}_max"]),
        node("Div", [x, f"{x}_max"], [f"{x}_rows"]),
    ]


def _float_product(part: int, x: str, k: str, names: list[str], bias: bool) -> list[NodeProto]:
    return _biased(part, helper.make_node("MatMul", [x, names[0]], [""]), names, bias)


def _int8_product(part: int, x: str, k: str, names: list[str], bias: bool) -> list[NodeProto]:
    product = f"product_{part}"
    whole = helper.make_node("DynamicQuantizeMatMul", [f"{x}_rows", *names[:2]], [product], domain=ENGINE)
    return [whole, *_biased(part, helper.make_node("Mul", [product, f"{x}_max"], [""]), names, bias)]


def _four_bit_product(part: int, x: str, k: str, names: list[str], bias: bool) -> list[NodeProto]:
    inputs = [x, *names[:3], *(["", names[-1]] if bias else [])]  # between them, an order of inputs
    made = helper.make_node("MatMulNBits", inputs, [f"out_{part}"], domain=ENGINE)
    _with_attributes(made, {"K": k, "N": f"n_{part}"}, AttributeProto.INT)
    sizes = {"bits": int4.BITS, "block_size": int4.BLOCK_SIZE, "accuracy_level": int4.ACCURACY_LEVEL}
    made.attribute.extend(helper.make_attribute(name, size) for name, size in sizes.items())
    return [made]


def _with_attributes(
    node: NodeProto, of_function: dict[str, str], kind: AttributeProto.AttributeType = AttributeProto.FLOAT
) -> NodeProto:
    """Return the node; its attributes are those of the function that it is in, as listed."""
    for name, given in of_function.items():
        node.attribute.append(AttributeProto(name=name, type=kind, ref_attr_name=given))
    return node


_PRODUCTS = {FLOAT: _float_product, INT8: _int8_product, FOUR_BIT: _four_bit_product}


def _biased(part: int, product: NodeProto, names: list[str], bias: bool) -> list[NodeProto]:
    """Return a node whose output is that of a part, once a bias, the last of its inputs, is added."""
    product.output[0] = f"linear_{part}" if bias else f"out_{part}"
    return [product, *([helper.make_node("Add", [product.output[0], names[-1]], [f"out_{part}"])] if bias else [])]
