"""One order for the outputs of an If: onnxscript takes it from a set of strings, so it changes with the hash seed."""

from onnx import FunctionProto


def order_outputs(function: FunctionProto) -> FunctionProto:
    """Return the function, changed: outputs of every If are sorted, and named, by what its first branch calls them."""
    named: dict[str, str] = {}
    for node in function.node:
        if node.op_type == "If":
            graphs = [attribute.g for attribute in node.attribute]
            pairs = sorted((output.name, i) for i, output in enumerate(graphs[0].output))
            named |= {node.output[i]: f"{name}_of_if" for name, i in pairs}
            for graph in graphs:
                outputs = [graph.output[i] for _, i in pairs]
                graph.ClearField("output")
                graph.output.extend(outputs)
            node.output[:] = [node.output[i] for _, i in pairs]
    for node in function.node:
        node.input[:] = [named.get(name, name) for name in node.input]
        node.output[:] = [named.get(name, name) for name in node.output]
    function.output[:] = [named.get(name, name) for name in function.output]
    function.ClearField("value_info")  # optional, and under the old names
    return function
