"""Cut a part out of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common


def cut(model: ir.Model, outputs: Sequence[ir.Value], given: Sequence[ir.Value] = ()) -> ir.Model:
    """Return a model of what `outputs` need, with the names of the whole graph; `model` stays as it is.

    Args:
        model: the whole.
        outputs: values of its graph, the part's outputs.
        given: values of its graph that the part reads as inputs, after those inputs of the whole that it needs.
    """
    part = model.clone()
    graph = part.graph
    twins = {value.name: value for node in graph for value in node.outputs}
    for value in given:
        read = ir.Value(name=value.name, shape=value.shape, type=value.type)
        twin = twins[value.name]
        twin.name = f"{value.name}.before"
        ir.convenience.replace_all_uses_with(twin, read)
        graph.inputs.append(read)
    graph.outputs[:] = [twins[value.name] for value in outputs]
    common.RemoveUnusedNodesPass()(part)
    drop_unused_inputs(graph)
    return part


def drop_unused_inputs(graph: ir.Graph) -> None:
    """Drop inputs that no node reads."""
    for value in list(graph.inputs):
        if not value.uses():
            graph.inputs.remove(value)
