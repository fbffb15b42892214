"""Functions of an export: the same bytes whatever order onnxscript found the outputs of an If in.

That whole exports of two processes are equal is held in test_export.py.
"""

import itertools

import pytest
from onnx import FunctionProto

from vlrt.backends import reference  # noqa: F401  (registers the ops that translate.py names)
from vlrt.export import branches, translate


def shuffled(function: FunctionProto, order: tuple[int, ...]) -> FunctionProto:
    """Return a copy whose Ifs give their outputs in another order, numbered anew as onnxscript numbers them."""
    out = FunctionProto()
    out.CopyFrom(function)
    for node in out.node:
        if node.op_type == "If":
            for attribute in node.attribute:
                outputs = [attribute.g.output[i] for i in order]
                attribute.g.ClearField("output")
                attribute.g.output.extend(outputs)
            numbers = [name.rsplit("_", 1)[1] for name in node.output]
            new = {
                node.output[i]: f"{node.output[i].rsplit('_', 1)[0]}_{n}" for i, n in zip(order, numbers, strict=True)
            }
            node.output[:] = [new[node.output[i]] for i in order]
            out.output[:] = [new.get(name, name) for name in out.output]
    return out


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_outputs_of_branches_have_one_order(order):
    """Catches exports that differ with the hash seed of their process: keys, values and output in another order."""
    function = translate.LaneAttention.to_function_proto()
    sorted_ = branches.order_outputs(shuffled(function, order))
    assert sorted_.SerializeToString() == branches.order_outputs(function).SerializeToString()
    (node,) = [node for node in sorted_.node if node.op_type == "If"]
    assert list(node.output) == ["k_new_of_if", "out_of_if", "v_new_of_if"]
    assert list(sorted_.output) == ["out_of_if", "k_new_of_if", "v_new_of_if"]
    for attribute in node.attribute:
        assert [name.name.rstrip("_0123456789") for name in attribute.g.output] == ["k_new", "out", "v_new"]
