"""Finds in a graph what goes together with a linear layer: thirds of its output, a gate, a norm, what is added to it.

Knows nodes and what reads them; changes nothing.
"""

import onnx_ir as ir


def thirds(node: ir.Node) -> tuple[ir.Node, list[ir.Node], list[ir.Node]] | None:
    """Return the Reshape, Slice and Squeeze nodes that cut a layer's output into thirds; the last in order."""
    readers = _readers(node.outputs[0])
    if [reader.op_type for reader in readers] != ["Reshape"]:
        return None
    view = readers[0].outputs[0]
    slices = _readers(view)
    if view.shape is None or len(view.shape) != 4 or view.shape[1] != 3:
        return None
    by_start = {}
    for cut in slices:
        start = ir.convenience.get_const_tensor(input_of(cut, 1)) if cut.op_type == "Slice" else None
        after = _readers(cut.outputs[0])
        if start is None or [reader.op_type for reader in after] != ["Squeeze"]:
            return None
        by_start[int(start.numpy()[0])] = after[0]
    found = [third for _, third in sorted(by_start.items())]
    return (readers[0], slices, found) if sorted(by_start) == [0, 1, 2] else None


def gate(same: list[ir.Node], node: ir.Node) -> tuple[list[ir.Node], list[ir.Node]] | None:
    """Return gate and up projection of a SwiGLU whose gate is `node`, and the nodes to replace, the last one last."""
    out = node.outputs[0]
    readers = _readers(out)
    if sorted(reader.op_type for reader in readers) != ["Mul", "Sigmoid"]:
        return None
    silu, sigmoid = sorted(readers, key=lambda reader: reader.op_type)
    if set(silu.inputs) != {out, sigmoid.outputs[0]} or len(_readers(sigmoid.outputs[0])) != 1:
        return None
    after = _readers(silu.outputs[0])
    if len(after) != 1 or after[0].op_type != "Mul":
        return None
    product = after[0]
    for up in same:
        alike = (bias_of(up) is None) == (bias_of(node) is None)
        if alike and up.outputs[0] in product.inputs and len(_readers(up.outputs[0])) == 1:
            return [node, up], [node, up, sigmoid, silu, product]
    return None


def norm(parts: list[ir.Node]) -> ir.Node | None:
    """Return the RMSNorm that some layers read, where nothing else does."""
    x = input_of(parts[0], 0)
    node = x.producer()
    alone = node is not None and node.op_type == "RMSNorm" and set(_readers(x)) == set(parts)
    return node if alone else None


def down(product: ir.Node, layers: list[ir.Node], before: ir.Node) -> tuple[ir.Node, ir.Node] | None:
    """Return the layer, of some, that alone reads a SwiGLU, and the Add of its output to what the norm reads."""
    readers = _readers(product.outputs[0])
    if len(readers) != 1 or readers[0] not in layers:
        return None
    add = residual(readers[0])
    return (readers[0], add[0]) if add is not None and add[1] is input_of(before, 0) else None


def residual(node: ir.Node) -> tuple[ir.Node, ir.Value] | None:
    """Return the Add that is all that reads a layer's output, and the activation of the same shape that it adds."""
    out = node.outputs[0]
    readers = _readers(out)
    if len(readers) != 1 or readers[0].op_type != "Add":
        return None
    others = [value for value in readers[0].inputs if value is not None and value is not out]
    if len(others) != 1 or others[0].is_initializer() or not _alike(others[0].shape, out.shape):
        return None
    return readers[0], others[0]


def _alike(a: ir.Shape | None, b: ir.Shape | None) -> bool:
    """Return whether shapes have one rank and equal numbers; free dimensions go by other names at a graph's inputs."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(x == y if isinstance(x, int) else not isinstance(y, int) for x, y in zip(a, b, strict=True))


def _readers(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value; none where it leaves the graph, so that no pattern takes it away."""
    return [] if value.is_graph_output() else list(dict.fromkeys(use.node for use in value.uses()))


def input_of(node: ir.Node, index: int) -> ir.Value:
    """Return an input that is there."""
    value = node.inputs[index]
    assert value is not None
    return value


def bias_of(node: ir.Node) -> ir.Value | None:
    """Return the bias of a `vlrt::Linear`."""
    return node.inputs[2] if len(node.inputs) > 2 else None
