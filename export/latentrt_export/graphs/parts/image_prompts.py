"""Keys and values of image prompts (IP-Adapter) as inputs of a UNet's graph.

An IP-Adapter lets every cross attention look at a picture's tokens too, apart from the text's:

    out = attention(q, text's keys, text's values) + scale * attention(q, picture's keys, picture's values)

The graph reads these keys and values. They have an axis of adapters, each with a softmax of its own, whose results are
added up; a scale is a factor of the values. Values of zeros add nothing, to the bit.
Source: Ye, Zhang, Liu, Han, Yang 2023, https://arxiv.org/abs/2308.06721.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import IMAGE_KEYS, IMAGE_VALUES
from latentrt_export.graphs.parts.adapters import Made, weight_of
from latentrt_export.graphs.passes import constant

ADAPTERS, TOKENS = "adapters", "image_tokens"  # names of dimensions
BLOCKS = ("down_blocks", "up_blocks", "mid_block")  # in the order in which IP-Adapter's files count attentions
QUERY = re.compile(rf"(?P<place>(?P<block>{'|'.join(BLOCKS)})\..+)\.attn\d+\.to_q\.weight")


class _Place(NamedTuple):
    """A cross attention: its number in the order of files, the name of the transformer block, and the node."""

    number: tuple[int, int]
    name: str
    node: ir.Node


def prompted_path(path: str) -> str:
    """Return the path of the graph with image prompts of the graph at `path`: unet/model.ip_adapter.onnx."""
    return f"{path.removesuffix('.onnx')}.ip_adapter.onnx"


def read_image_prompts(model: ir.Model) -> tuple[ir.Value, ...]:
    """Let the graph of a denoiser look at pictures, in place.

    Args:
        model: a float32 graph of a UNet as export writes it, which reads the text's keys and values.

    Returns:
        The new inputs: for each cross attention image_keys.PLACE, then image_values.PLACE, (batch, adapters,
        image_tokens, channels) both, in the order of IP-Adapter's files. () if it is no such UNet.
    """
    places = [_place(index, node) for index, node in enumerate(model.graph) if _reads_text(model.graph, node)]
    found = sorted(place for place in places if place is not None)
    if len(found) < len(places):
        return ()
    inputs = [value for place in found for value in _look(model.graph, place)]
    model.graph.inputs.extend(inputs)
    return tuple(inputs)


def _reads_text(graph: ir.Graph, node: ir.Node) -> bool:
    return node.op_type == "Attention" and node.inputs[1] in graph.inputs and node.inputs[2] in graph.inputs


def _place(index: int, node: ir.Node) -> _Place | None:
    """Return where a cross attention stands, by the name of the weight of its queries; None where that has another."""
    query = node.inputs[0]
    product = query.producer() if query is not None else None
    weight = weight_of(product.inputs[1])[0] if product is not None and product.op_type == "MatMul" else None
    match = QUERY.fullmatch(str(weight.name)) if weight is not None else None
    return None if match is None else _Place((BLOCKS.index(match["block"]), index), match["place"], node)


def _look(graph: ir.Graph, place: _Place) -> tuple[ir.Value, ir.Value]:
    """Add attention to pictures to one of text; return the inputs with their keys and values."""
    node, name = place.node, f"image.{place.name}"
    query, out, heads = node.inputs[0], node.outputs[0], node.attributes["q_num_heads"].as_int()
    assert query is not None
    assert query.shape is not None
    channels = query.shape[2]
    assert isinstance(channels, int)
    shape = ir.Shape([query.shape[0], ADAPTERS, TOKENS, channels])
    keys, values = (
        ir.Value(name=f"{prefix}{place.name}", shape=shape, type=ir.TensorType(query.dtype))
        for prefix in (IMAGE_KEYS, IMAGE_VALUES)
    )
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else (channels / heads) ** -0.5
    strength = constant(graph, f"image_scale_{scale:.9g}", np.array(scale, query.dtype.numpy()))
    split = constant(graph, f"to_0_0_{heads}_-1", np.array([0, 0, heads, -1], np.int64))
    each = constant(graph, f"to_0_0_0_{heads}_-1", np.array([0, 0, 0, heads, -1], np.int64))
    merged = constant(graph, f"to_0_0_{channels}", np.array([0, 0, channels], np.int64))
    second = constant(graph, "axis_1", np.array([1], np.int64))
    made = Made(name, query.dtype)
    queries = made("Transpose", [made("Reshape", [query, split])], perm=[0, 2, 1, 3])  # batch, heads, pixels, size
    queries = made("Unsqueeze", [queries, second])
    scaled = made("Reshape", [made("Mul", [keys, strength]), each])
    scores = made("MatMul", [queries, made("Transpose", [scaled], perm=[0, 1, 3, 4, 2])])
    seen = made("Transpose", [made("Reshape", [values, each])], perm=[0, 1, 3, 2, 4])
    results = made("MatMul", [made("Softmax", [scores], axis=-1), seen])  # batch, adapters, heads, pixels, size
    added = made("Transpose", [made("ReduceSum", [results, second], keepdims=0)], perm=[0, 2, 1, 3])
    added = made("Reshape", [added, merged])
    total = made("Add", [out, added])
    total.shape = out.shape
    last = made.nodes[-1]
    for use in [use for use in out.uses() if use.node is not last]:
        use.node.replace_input_with(use.idx, total)
    graph.insert_after(node, made.nodes)
    return keys, values
