"""Lowers `vlrt::Linear` placeholders to operators of a precision, and says how their weights are made.

They become functions of linear_functions.py, which take in layers that share an input, the gate of an MLP, and what is
added to an output. int8: per-channel symmetric weights and per-token activations. int4: so many bits for the weights of
the decoder's layers, int8 elsewhere.
Knows graphs and recipes for weights; no files.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from vlrt.bundle import Precision
from vlrt.export import int4, linear_functions, patterns
from vlrt.export.translate import DOMAIN

Floats = NDArray[np.float32]
INT8_MAX = 127
HEAD = "lm_head.weight"  # in fp32 it stays [V, C]: its file also serves lookups of rows
KEPT_FP32 = frozenset({"visual.patch_embed.proj.weight"})  # first layer: raw pixels in, and a thousandth of the work
INT4_PREFIX = "model.layers."  # most of the weights. What picks tokens, and what all else is computed from, stays int8


@dataclass(frozen=True)
class Recipe:
    """How one initializer of a graph is made of one tensor of the checkpoint."""

    source: str
    dtype: ir.DataType
    make: Callable[[Floats], NDArray[np.generic]]


@dataclass(frozen=True)
class Cut:
    """The rows of a tensor of the checkpoint that a layer has: all of any shape, or a third of [out, ...].

    Attributes:
        source: tensor of the checkpoint.
        first: row.
        last: row behind the last one; None: the whole tensor, a scalar too.
    """

    source: str
    first: int = 0
    last: int | None = None

    def __call__(self, weight: Floats) -> Floats:
        """Return those rows of the tensor."""
        return weight if self.last is None else weight[self.first : self.last]


def lower_linears(model: ir.Model, precision: Precision, kept: Collection[str] = ()) -> dict[str, Recipe]:
    """Replace every `vlrt::Linear` of a model; return a recipe for each initializer that it then has.

    `kept` names weights that stay fp32 in any precision, as those of KEPT_FP32 do.
    """
    graph = model.graph
    kept = KEPT_FP32.union(kept)
    recipes: dict[str, Recipe] = {}
    cuts: dict[str, Cut] = {}
    for node in _linears(graph):
        _divide(graph, node, cuts)
    formats: dict[linear_functions.Format, list[ir.Node]] = {}
    for node in _linears(graph):
        name = str(patterns.input_of(node, 1).name)
        weights = _format(name, precision, kept=cuts.get(name, Cut(name)).source in kept)
        if name == HEAD and weights is linear_functions.FLOAT:
            _lower_head(graph, node)
        else:
            formats.setdefault(weights, []).append(node)
    for weights, linears in formats.items():
        _lower(graph, linears, weights, recipes, cuts)
    linear_functions.attach(model)
    _drop_unused(graph)
    for name in graph.initializers:
        cut = cuts.get(name, Cut(name))
        recipes.setdefault(name, Recipe(cut.source, ir.DataType.FLOAT, cut))
    return {name: recipes[name] for name in graph.initializers}


def _linears(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if (node.domain, node.op_type) == (DOMAIN, "Linear")]


def _format(name: str, precision: Precision, *, kept: bool) -> linear_functions.Format:
    """Return how a weight is stored; `kept`: in fp32."""
    if precision == "fp32" or kept:
        return linear_functions.FLOAT
    coarse = precision == "int4" and name.startswith(INT4_PREFIX)
    return linear_functions.FOUR_BIT if coarse else linear_functions.INT8


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


def _lower_head(graph: ir.Graph, node: ir.Node) -> None:
    product = ir.Node("", "Gemm", node.inputs[:2], [ir.AttrInt64("transB", 1)], num_outputs=1)
    _replace(graph, [node], node, [product])


@dataclass(frozen=True)
class _Together:
    """Layers that one node calls a function for.

    Attributes:
        variant: the function's.
        parts: layers.
        replaced: nodes whose place it takes; the last one leaves the output, where there is one.
        norm: that is before all of them, and goes with them.
        residual: what is added.
    """

    variant: linear_functions.Variant | None
    parts: list[ir.Node]
    replaced: list[ir.Node]
    norm: ir.Node | None = None
    residual: ir.Value | None = None


def _lower(
    graph: ir.Graph,
    linears: list[ir.Node],
    weights: linear_functions.Format,
    recipes: dict[str, Recipe],
    cuts: dict[str, Cut],
) -> None:
    """Emit calls of functions, several layers in one node where a function takes them."""
    left = dict.fromkeys(linears)
    for node in linears:
        if node not in left:
            continue
        found = _together(node, list(left), weights)
        assert found.variant is not None
        inputs, attributes = [patterns.input_of(node, 0)], {}
        if found.norm is not None:
            inputs = [patterns.input_of(found.norm, i) for i in range(2)]
            attributes["eps"] = found.norm.attributes["eps"]
        for i, part in enumerate(found.parts):
            weight = patterns.input_of(part, 1)
            inputs += _STORED[weights](graph, weight, recipes, cuts.get(str(weight.name), Cut(str(weight.name))))
            inputs += [] if (bias := patterns.bias_of(part)) is None else [bias]
            if weights is linear_functions.FOUR_BIT:
                assert weight.shape is not None
                size, k = weight.shape.numpy()
                attributes[f"n_{i}"] = ir.AttrInt64(f"n_{i}", size)
                attributes.setdefault("k", ir.AttrInt64("k", k))
            del left[part]
        inputs += [] if found.residual is None else [found.residual]
        ordered = [attributes[name] for name in sorted(attributes)]
        name, outputs = found.variant.name(weights), found.variant.num_outputs
        call = ir.Node(DOMAIN, name, inputs, ordered, num_outputs=outputs)
        _replace(graph, found.replaced, found.replaced[0 if outputs > 1 else -1], [call])
        if found.norm is not None:
            graph.remove(found.norm, safe=True)


def _together(node: ir.Node, left: list[ir.Node], weights: linear_functions.Format) -> _Together:
    """Return the most that a function of a format takes, beginning with a layer, of the layers that are left."""
    known = linear_functions.variants(weights)
    bias = patterns.bias_of(node) is not None
    same = [other for other in left if patterns.input_of(other, 0) is patterns.input_of(node, 0)]
    if gate := patterns.gate(same, node):
        parts, replaced = gate
        norm, whole = patterns.norm(parts), linear_functions.find(3, bias=bias, gated=True, norm=True, down=True)
        down = None if norm is None else patterns.down(replaced[-1], left, norm)
        if whole in known and down is not None and (patterns.bias_of(down[0]) is not None) == bias:
            return _Together(whole, [*parts, down[0]], [*replaced, *down], norm)
        return _Together(linear_functions.find(2, bias=bias, gated=True), parts, replaced)
    if len(same) == 3 and all(patterns.bias_of(part) is not None for part in same):
        norm, whole = patterns.norm(same), linear_functions.find(3, bias=True, norm=True)
        if norm is not None and whole in known:
            return _Together(whole, same, same, norm)
        return _Together(linear_functions.find(3, bias=True), same, same)
    add, residual = patterns.residual(node) or (None, None)
    variant = linear_functions.find(1, bias=bias, residual=residual is not None)
    return _Together(variant, [node], [node] if add is None else [node, add], residual=residual)


def _float_weights(graph: ir.Graph, weight: ir.Value, recipes: dict[str, Recipe], cut: Cut) -> list[ir.Value]:
    """Return the transposed matrix that is made of a weight."""
    matrix = _derived(graph, weight, ".t", ir.DataType.FLOAT, (1, 0))
    recipes[str(matrix.name)] = Recipe(cut.source, ir.DataType.FLOAT, lambda w: _matrix(cut(w)).T)
    return [matrix]


def _int8_weights(graph: ir.Graph, weight: ir.Value, recipes: dict[str, Recipe], cut: Cut) -> list[ir.Value]:
    """Return the int8 matrix and the scales that are made of a weight."""
    q = _derived(graph, weight, ".q", ir.DataType.INT8, (1, 0))
    scale = _derived(graph, weight, ".scale", ir.DataType.FLOAT, (0,))
    recipes[str(q.name)] = Recipe(cut.source, ir.DataType.INT8, lambda w: quantize_columns(cut(w))[0])
    recipes[str(scale.name)] = Recipe(cut.source, ir.DataType.FLOAT, lambda w: quantize_columns(cut(w))[1])
    return [q, scale]


def _four_bit_weights(graph: ir.Graph, weight: ir.Value, recipes: dict[str, Recipe], cut: Cut) -> list[ir.Value]:
    """Return codes, scales, zero points, and the scales of whole columns that are made of a weight."""
    assert weight.shape is not None
    made = int4.Last()
    found = []
    for i, (suffix, shape) in enumerate(zip(int4.SUFFIXES, int4.shapes(*weight.shape.numpy()), strict=True)):
        dtype = ir.DataType.UINT8 if suffix in int4.BYTES else ir.DataType.FLOAT
        value = _initializer(graph, f"{weight.name}{suffix}", dtype, ir.Shape(shape))
        recipes[str(value.name)] = Recipe(cut.source, dtype, lambda w, i=i: made(cut(w))[i])  # type: ignore[misc]
        found.append(value)
    return found


_STORED = {
    linear_functions.FLOAT: _float_weights,
    linear_functions.INT8: _int8_weights,
    linear_functions.FOUR_BIT: _four_bit_weights,
}


def _divide(graph: ir.Graph, node: ir.Node, cuts: dict[str, Cut]) -> None:
    """Make three layers of one whose output is cut into q, k and v, so that each writes what is read; fill `cuts`.

    What is matched: [N, 3 H D] -> Reshape [N, 3, H, D] -> Slice and Squeeze of each third.
    """
    parts, weight, bias = patterns.thirds(node), patterns.input_of(node, 1), patterns.bias_of(node)
    if parts is None or bias is None:
        return
    reshape, slices, squeezes = parts
    assert weight.shape is not None
    num_outputs, num_inputs = weight.shape.numpy()
    rows = num_outputs // 3
    for i, squeeze in enumerate(squeezes):
        inputs = [patterns.input_of(node, 0)]
        for whole, shape in ((weight, (rows, num_inputs)), (bias, (rows,))):
            third = _initializer(graph, f"{whole.name}.{i}", ir.DataType.FLOAT, ir.Shape(shape))
            cuts[str(third.name)] = Cut(str(whole.name), i * rows, (i + 1) * rows)
            inputs.append(third)
        linear = ir.Node(DOMAIN, "Linear", inputs, num_outputs=1, name=f"{node.outputs[0].name}.{i}")
        heads = squeeze.outputs[0].shape
        assert heads is not None
        sizes = [-1, *(int(size) for size in heads[1:])]  # type: ignore[arg-type]
        shape_of = ir.Node("", "Constant", [], [ir.AttrInt64s("value_ints", sizes)], num_outputs=1)
        view = ir.Node("", "Reshape", [linear.outputs[0], shape_of.outputs[0]], num_outputs=1)
        for value, name in ((linear.outputs[0], "linear"), (shape_of.outputs[0], "shape")):
            value.name = f"{squeeze.outputs[0].name}.{name}"
        _replace(graph, [squeeze], squeeze, [linear, shape_of, view])
    graph.remove([*slices, reshape, node], safe=True)


def _replace(graph: ir.Graph, old: list[ir.Node], last: ir.Node, new: list[ir.Node]) -> None:
    """Put new nodes where `last` was; their last one's outputs take the place of those of `old` that are read."""
    outs = [node.outputs[0] for node in old] if len(new[-1].outputs) > 1 else [last.outputs[0]]
    names = [value.name for value in outs]
    graph.insert_before(last, new)
    for value, out in zip(outs, new[-1].outputs, strict=True):
        for i, leaving in enumerate(graph.outputs):
            if leaving is value:
                graph.outputs[i] = out
        out.shape, out.type = value.shape, value.type
        ir.convenience.replace_all_uses_with(value, out)
    graph.remove(old, safe=True)
    for name, out in zip(names, new[-1].outputs, strict=True):
        out.name = name


def _derived(graph: ir.Graph, weight: ir.Value, suffix: str, dtype: ir.DataType, axes: tuple[int, ...]) -> ir.Value:
    """Return an initializer that is made of a weight [out, in]; its axes are the weight's, as listed."""
    assert weight.shape is not None
    return _initializer(graph, f"{weight.name}{suffix}", dtype, ir.Shape([weight.shape[a] for a in axes]))


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: ir.Shape) -> ir.Value:
    if name not in graph.initializers:
        value = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype))
        value.const_value = ir.LazyTensor(_unwritten, dtype=dtype, shape=shape, name=name)
        graph.register_initializer(value)
    return graph.initializers[name]


def _unwritten() -> ir.TensorProtocol:
    raise AssertionError("weights are written before a graph is saved")


def _drop_unused(graph: ir.Graph) -> None:
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
