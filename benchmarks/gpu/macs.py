"""The number of multiplications in a network's graph: the work for a GPU's matrix units."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator

INT64 = onnx.TensorProto.INT64
SIZES = ("Add", "Sub", "Mul", "Div", "Squeeze", "Unsqueeze", "Concat", "Gather", "Slice", "Cast", "Reshape")
Shapes = Mapping[str, tuple[int, ...]]


def macs(path: Path, sizes: Mapping[str, int]) -> int:
    """Return the multiply-accumulates of one call: those of convolutions, matrix products and attention, as is usual.

    Args:
        path: a graph of a bundle; its weights may be missing.
        sizes: of the symbolic dimensions of its inputs: {"batch": 2, "height": 64, "width": 64}.
    """
    model = _sized(onnx.load(path, load_external_data=False), sizes)
    shapes = _shapes(model.graph)
    return sum(_node(node, shapes) for node in model.graph.node)


def _sized(model: onnx.ModelProto, sizes: Mapping[str, int]) -> onnx.ModelProto:
    """Return the graph with every dimension a number; what was inferred for symbols is dropped."""
    for value in model.graph.input:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_value = sizes[side.dim_param]
    for value in model.graph.output:
        for side in value.type.tensor_type.shape.dim:
            side.Clear()
    del model.graph.value_info[:]
    known = onnx.shape_inference.infer_shapes(model, data_prop=True)
    _fold_sizes(known.graph)
    return onnx.shape_inference.infer_shapes(known, data_prop=True)


def _fold_sizes(graph: onnx.GraphProto) -> None:
    """Do the arithmetic on sizes (of what is resized, as a rule), which shape inference leaves alone."""
    shapes = _shapes(graph)
    found = {
        t.name: numpy_helper.to_array(t) for t in graph.initializer if not t.external_data and t.data_type == INT64
    }
    for node in graph.node:
        shape = shapes.get(node.input[0], ()) if node.op_type == "Shape" else ()
        if all(shape) and (shape or (node.op_type in SIZES and all(name in found for name in node.input))):
            feeds = {name: np.empty(shape, bool) if shape else found[name] for name in node.input}
            found[node.output[0]] = _evaluate(node, feeds)
            graph.initializer.append(numpy_helper.from_array(found[node.output[0]], node.output[0]))
    made = {tensor.name for tensor in graph.initializer}
    kept = [node for node in graph.node if node.output[0] not in made]
    del graph.node[:]
    graph.node.extend(kept)


def _evaluate(node: onnx.NodeProto, feeds: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in feeds.items()
    ]
    graph = helper.make_graph([node], "sizes", inputs, [onnx.ValueInfoProto(name=node.output[0])])
    return np.asarray(ReferenceEvaluator(helper.make_model(graph)).run(None, dict(feeds))[0])


def _shapes(graph: onnx.GraphProto) -> Shapes:
    values = (*graph.value_info, *graph.input, *graph.output)
    shapes = {v.name: tuple(side.dim_value for side in v.type.tensor_type.shape.dim) for v in values}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}


def _node(node: onnx.NodeProto, shapes: Shapes) -> int:
    """Return one node's share.

    Raises:
        ValueError: the shape of one of its products could not be inferred.
    """
    if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul", "Attention"):
        return 0
    read = [shapes.get(name, ()) for name in node.input if name]
    out = shapes.get(node.output[0], ())
    if not out or not all((*out, *read[0], *read[1])):
        raise ValueError(f"the shapes around {node.name} ({node.op_type}) are not known: {read} to {out}")
    if node.op_type == "Attention":
        return _attention(read[0], read[1], read[2])
    if node.op_type == "ConvTranspose":
        return math.prod(read[0]) * math.prod(read[1][1:])
    inner = math.prod(read[1][1:]) if node.op_type == "Conv" else _inner(node, read[0])
    return math.prod(out) * inner


def _inner(node: onnx.NodeProto, left: tuple[int, ...]) -> int:
    """Return the length of a matrix product's sums."""
    transposed = any(each.name == "transA" and each.i for each in node.attribute)
    return left[0] if transposed else left[-1]


def _attention(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> int:
    """Count scores and their product with values: (batch, tokens, heads * width) or (batch, heads, tokens, width)."""
    return math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1]
