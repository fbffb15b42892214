"""Lowers `vlrt::Linear` placeholders to operators of a precision, and says how their weights are made.

fp32: MatMul on the transposed weight. int8: per-channel symmetric weights, per-token activations: each row is divided
by its own largest magnitude before DynamicQuantizeMatMul, which quantises per tensor, and multiplied back after. That
makes its one scale serve every token, at its speed. Knows graphs and recipes for weights; no files.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlrt.bundle import Precision
from vlrt.export.translate import DOMAIN

Floats = NDArray[np.float32]
INT8_MAX = 127
HEAD = "lm_head.weight"  # in fp32 it stays [V, C]: its file also serves lookups of rows
KEPT_FP32 = frozenset({"visual.patch_embed.proj.weight"})  # first layer: raw pixels in, and a thousandth of the work


@dataclass(frozen=True)
class Recipe:
    """How one initializer of a graph is made of one tensor of the checkpoint."""

    source: str
    dtype: ir.DataType
    make: Callable[[Floats], NDArray[np.generic]]


def lower_linears(model: ir.Model, precision: Precision) -> dict[str, Recipe]:
    """Replace every `vlrt::Linear` of a model; return a recipe for each initializer that it then has."""
    graph = model.graph
    normalised: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
    recipes: dict[str, Recipe] = {}
    for node in [n for n in graph if (n.domain, n.op_type) == (DOMAIN, "Linear")]:
        x, weight, bias = node.inputs[0], node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None
        assert x is not None
        assert weight is not None
        assert weight.name is not None
        tape = _Tape(graph, node)
        if precision == "fp32" and weight.name == HEAD:
            out = tape("Gemm", [x, weight], {"transB": 1})
        elif precision == "int8" and weight.name not in KEPT_FP32:
            out = _lower_int8(tape, x, weight, normalised, recipes)
        else:
            matrix = _derived(graph, weight, ".t", ir.DataType.FLOAT, (1, 0))
            recipes[str(matrix.name)] = Recipe(weight.name, ir.DataType.FLOAT, lambda w: _matrix(w).T)
            out = tape("MatMul", [x, matrix])
        if bias is not None:
            out = tape("Add", [out, bias])
        tape.replace(out)
    _drop_unused(graph)
    for name in graph.initializers:
        recipes.setdefault(name, Recipe(name, ir.DataType.FLOAT, lambda w: w))
    return {name: recipes[name] for name in graph.initializers}


def quantize_columns(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """Quantise a weight [out, in] per output channel; return int8 [in, out] and scales [out], `q * scale ~ weight`."""
    weight = _matrix(weight)
    scale = np.abs(weight).max(axis=1) / np.float32(INT8_MAX)
    safe = np.where(scale > np.finfo(np.float32).tiny, scale, 1).astype(np.float32)  # below, division is too coarse
    q = np.rint(weight / safe[:, None]).astype(np.int8)
    return np.ascontiguousarray(q.T), safe


def _matrix(weight: Floats) -> Floats:
    """Return a weight [out, ...] as [out, in]: a Conv3d whose kernel equals its stride is a linear layer."""
    return weight.reshape(len(weight), -1)


def _lower_int8(
    tape: "_Tape",
    x: ir.Value,
    weight: ir.Value,
    normalised: dict[ir.Value, tuple[ir.Value, ir.Value]],
    recipes: dict[str, Recipe],
) -> ir.Value:
    """Emit the int8 product; linear layers that share an input share its normalisation."""
    assert weight.name is not None
    if x not in normalised:
        last = tape.constant(np.array([-1], np.int64), "axis")
        largest = tape("ReduceMax", [tape("Abs", [x]), last], {"keepdims": 1})
        row_max = tape("Max", [largest, tape.constant(np.array(1e-20, np.float32), "tiny")])
        normalised[x] = tape("Div", [x, row_max]), row_max
    rows, row_max = normalised[x]
    q = _derived(tape.graph, weight, ".q", ir.DataType.INT8, (1, 0))
    scale = _derived(tape.graph, weight, ".scale", ir.DataType.FLOAT, (0,))
    recipes[str(q.name)] = Recipe(weight.name, ir.DataType.INT8, lambda w: quantize_columns(w)[0])
    recipes[str(scale.name)] = Recipe(weight.name, ir.DataType.FLOAT, lambda w: quantize_columns(w)[1])
    product = tape("DynamicQuantizeMatMul", [rows, q, scale], domain="com.microsoft")
    return tape("Mul", [product, row_max])


class _Tape:
    """Emits nodes before one node of a graph, in whose place the last of them comes."""

    def __init__(self, graph: ir.Graph, before: ir.Node) -> None:
        self.graph, self._before, self._count = graph, before, 0
        self._base = str(before.outputs[0].name)

    def __call__(
        self,
        op_type: str,
        inputs: list[ir.Value],
        attributes: dict[str, int] | None = None,
        domain: str = "",
    ) -> ir.Value:
        attrs = [ir.AttrInt64(name, value) for name, value in (attributes or {}).items()]
        return self._insert(ir.Node(domain, op_type, inputs, attrs, num_outputs=1), op_type)

    def constant(self, value: NDArray[np.generic], name: str) -> ir.Value:
        """Emit a Constant node."""
        return self._insert(
            ir.Node("", "Constant", [], [ir.AttrTensor("value", ir.tensor(value))], num_outputs=1), name
        )

    def replace(self, out: ir.Value) -> None:
        """Put `out` wherever the replaced node's output was used, graph outputs included, and remove the node."""
        old = self._before.outputs[0]
        name, shape, kind = old.name, old.shape, old.type
        for i, value in enumerate(self.graph.outputs):
            if value is old:
                self.graph.outputs[i] = out
                out.shape, out.type = shape, kind
        ir.convenience.replace_all_uses_with(old, out)
        self.graph.remove(self._before, safe=True)
        out.name = name

    def _insert(self, node: ir.Node, label: str) -> ir.Value:
        self._count += 1
        node.outputs[0].name = f"{self._base}.{label}.{self._count}"
        self.graph.insert_before(self._before, node)
        return node.outputs[0]


def _derived(graph: ir.Graph, weight: ir.Value, suffix: str, dtype: ir.DataType, axes: tuple[int, ...]) -> ir.Value:
    """Return an initializer that is made of a weight [out, in]; its axes are the weight's, as listed."""
    name = f"{weight.name}{suffix}"
    if name not in graph.initializers:
        assert weight.shape is not None
        shape = ir.Shape([weight.shape[a] for a in axes])
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        value.const_value = ir.LazyTensor(_unwritten, dtype=dtype, shape=shape, name=name)
        graph.register_initializer(value)
    return graph.initializers[name]


def _unwritten() -> ir.TensorProtocol:
    raise AssertionError("weights are written before a graph is saved")


def _drop_unused(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
