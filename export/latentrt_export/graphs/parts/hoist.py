"""Take out of the denoiser's graph what every row would compute again: the keys and values of the text.

A row changes latents and timestep; what depends on the text alone is the same in all of them. It becomes a graph of its
own, called once a picture, whose outputs are inputs of the denoiser. The arithmetic stays the same, node by node.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx_ir as ir
import onnx_ir.passes.common as common

from latentrt_export.graphs.parts.cut import cut, drop_unused_inputs

PREFIX = "text."  # of the names of what is taken out


def hoist(model: ir.Model, names: Collection[str]) -> ir.Model | None:
    """Move the nodes that depend on some inputs alone, and on weights, to a model of their own.

    Args:
        model: a traced graph, changed in place: it reads what the other gives instead of these inputs, which it keeps
            only where it still needs them.
        names: of the inputs.

    Returns:
        The other model: these inputs in, `PREFIX` and a number out, in the order of the graph; None if nothing can be
        taken out.
    """
    graph = model.graph
    given = [value for value in graph.inputs if value.name in names]
    nodes = _following(graph, given)
    moved = set(nodes)
    border = [value for node in nodes for value in node.outputs if any(u not in moved for u in value.consumers())]
    if not border:
        return None
    other = cut(model, border)
    for index, (value, made) in enumerate(zip(border, other.graph.outputs, strict=True)):
        made.name = f"{PREFIX}{index}"
        read = ir.Value(name=made.name, shape=value.shape, type=value.type)
        graph.inputs.append(read)
        ir.convenience.replace_all_uses_with(value, read)
    graph.remove(nodes, safe=True)
    common.RemoveUnusedNodesPass()(model)
    drop_unused_inputs(graph)
    return other


def _following(graph: ir.Graph, given: Collection[ir.Value]) -> list[ir.Node]:
    """Return the nodes that read what follows from `given`, and nothing else that is not constant.

    What they give has the axis of the batch first, so that each lane of it is what the lane's text gives.
    """
    constant, known, nodes = set(graph.initializers.values()), set(given), list[ir.Node]()
    for node in graph:
        read = [value for value in node.inputs if value is not None]
        if all(value in constant for value in read):
            constant.update(node.outputs)
        elif all(value in constant or value in known for value in read) and _by_lane(node, given):
            known.update(node.outputs)
            nodes.append(node)
    return nodes


def _by_lane(node: ir.Node, given: Collection[ir.Value]) -> bool:
    """Return whether all that a node gives has the first axis of the inputs."""
    lanes = {value.shape[0] for value in given if value.shape is not None}
    shapes = [value.shape for value in node.outputs]
    return all(shape is not None and len(shape) > 0 and shape[0] in lanes for shape in shapes)
