"""A UNet without its depth, for step caching: the first convolution, and the last layer on the way up.

Between rows that follow each other the deep features of a UNet hardly change. A full call gives what comes up from
below to the last layer, "deep"; a shallow call reads it again instead of computing it.

Source: Ma, Fang, Wang 2023, DeepCache, https://arxiv.org/abs/2312.00858, at its cheapest branch.
"""

from __future__ import annotations

import onnx_ir as ir

from latentrt_export.graphs.parts.cut import cut

DEEP = "deep"


def shallow(model: ir.Model) -> ir.Model | None:
    """Return the shallow graph of a denoiser, and give the denoiser the output "deep", in place.

    Args:
        model: a traced graph with the output "out".

    Returns:
        A model that reads "deep" and those of the denoiser's inputs that it needs; None if the graph is no UNet whose
        last layer joins what comes from below with the first convolution's output.
    """
    graph = model.graph
    deep = _from_below(graph)
    if deep is None:
        return None
    made = cut(model, [value for value in graph.outputs if value.name == "out"], [deep])
    sample = next(value for value in graph.inputs if value.name == "sample")
    assert sample.shape is not None
    assert deep.shape is not None
    for value in (deep, made.graph.inputs[-1]):  # the tracer writes sizes in its own form, as 8*((height - 1)//8) + 8
        value.name, value.shape = DEEP, ir.Shape([sample.shape[0], deep.shape[1], *sample.shape[2:]])
    graph.outputs.append(deep)
    return made


def _from_below(graph: ir.Graph) -> ir.Value | None:
    """Return what the last Concat over channels joins with the first convolution's output."""
    first = next((node.outputs[0] for node in graph if node.op_type == "Conv"), None)
    joins = [node for node in graph if node.op_type == "Concat" and first in node.inputs]
    if not joins or len(joins[-1].inputs) != 2:
        return None
    return joins[-1].inputs[0]
