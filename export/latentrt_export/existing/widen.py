"""A graph that computes in float16 as the float32 graph of the same weights.

Weights stay as they are stored, behind a Cast, as in the graphs that export traces: see `latentrt_export.graphs.half`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from latentrt_export.graphs.passes import is_weight

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT


def widen(model: ir.Model) -> None:
    """Let every node compute in float32, in place; a graph without float16 stays as it is.

    Args:
        model: from `latentrt_export.existing.reading`.
    """
    graph = model.graph
    casts = []
    for value in list(graph.initializers.values()):
        if value.dtype == HALF:
            if is_weight(value):
                casts.append(_cast(value))
            else:
                tensor = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
                value.const_value, value.dtype = tensor, SINGLE
    for node in graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype == HALF:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
            elif name in ("to", "dtype") and attribute.value == HALF:
                node.attributes[name] = ir.AttrInt64(name, int(SINGLE))
        for value in node.outputs:
            if value.dtype == HALF:
                value.dtype = SINGLE
    for value in graph.inputs:
        if value.dtype == HALF:
            value.dtype = SINGLE
    if casts:
        graph.insert_before(graph[0], casts)


def _cast(weight: ir.Value) -> ir.Node:
    """Return a Cast of a weight, which all that read the weight read now."""
    cast = ir.node("Cast", [weight], attributes={"to": SINGLE}, name=f"{weight.name}.cast")
    wide = cast.outputs[0]
    wide.name, wide.shape, wide.dtype = f"{weight.name}.float", weight.shape, SINGLE
    ir.convenience.replace_all_uses_with(weight, wide)
    cast.replace_input_with(0, weight)
    return cast
