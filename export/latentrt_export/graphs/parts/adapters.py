"""LoRAs as inputs of a graph: each product with a weight adds (x · A) · B, where A and B are each lane's own.

Adapted are products of tokens (attention, feed-forward), and convolutions of one pixel that keep the number of
channels: the projections around Stable Diffusion 1.5's transformers, which are such products too. LoRAs that change
time embeddings or shortcuts of resnets change larger convolutions as well, and are merged into the weights.

With zeros the graph computes what it computed before, to the bit. So sums stand where they leave runtimes' fusions as
they were: directly behind a product of tokens, before its bias, which may be fused into a norm; and behind the Add that
follows a convolution, which is fused into that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import LORA
from latentrt_export.graphs.passes import constant

RANK = "rank"  # the name of the dimension
SINGLE = ir.DataType.FLOAT


def adapted_path(path: str) -> str:
    """Return the path of the adapted graph of the graph at `path`: unet/model.onnx, unet/model.lora.onnx."""
    return f"{path.removesuffix('.onnx')}.lora.onnx"


def read_adapters(model: ir.Model) -> tuple[ir.Value, ...]:
    """Let a graph take LoRAs of each lane, in place.

    Args:
        model: a graph as export writes it, in float32 or float16, whose weights lie in safetensors.

    Returns:
        The new inputs, in the dtype of the first: for each module lora.MODULE.down (batch, in, rank) and
        lora.MODULE.up (batch, rank, out).
    """
    inputs: list[ir.Value] = []
    for node, weight in list(_products(model.graph)):
        down, up = declare_adapters(model.graph, weight)
        _adapt(model.graph, node, str(weight.name).removesuffix(".weight"), down, up)
        inputs += [down, up]
    return tuple(inputs)


def declare_adapters(graph: ir.Graph, weight: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Add the two inputs of the LoRAs of a weight, (out, in) or (out, in, 1, 1), to a graph; return them."""
    batch, dtype = next((value.shape[0], value.dtype) for value in graph.inputs if value.dtype != ir.DataType.INT64)
    module = str(weight.name).removesuffix(".weight")
    out, wide = weight.shape[0], weight.shape[1]
    down = _input(graph, f"{LORA}{module}.down", (batch, wide, RANK), dtype)
    return down, _input(graph, f"{LORA}{module}.up", (batch, RANK, out), dtype)


def _products(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value]]:
    """Yield the nodes that are adapted, each with its weight (out, in) or (out, in, 1, 1)."""
    for node in graph:
        if node.op_type not in ("MatMul", "Conv"):
            continue
        weight, turned = weight_of(node.inputs[1])
        if weight is None or weight.shape is None or not str(weight.name).endswith(".weight"):
            continue
        if turned if node.op_type == "MatMul" else not turned and is_of_one_pixel(node, weight):
            yield node, weight


def weight_of(value: ir.Value | None) -> tuple[ir.Value | None, bool]:
    """Return the weight in a file that a value is made of, and whether it is transposed."""
    turned = False
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in ("Cast", "Transpose"):
            return None, False
        turned ^= producer.op_type == "Transpose"
        value = producer.inputs[0]
    stored = value is not None and isinstance(value.const_value, ir.ExternalTensor)
    return (value, turned) if stored else (None, False)


def is_of_one_pixel(node: ir.Node, weight: ir.Value) -> bool:
    """Return whether a convolution, or the product that it became, is a product that keeps the channels."""
    assert weight.shape is not None
    out, wide, *kernel = weight.shape
    plain = {"strides": [1, 1], "pads": [0, 0, 0, 0], "dilations": [1, 1]}
    own = {name: list(node.attributes[name].as_ints()) for name in plain if name in node.attributes}
    groups = node.attributes["group"].as_int() if "group" in node.attributes else 1
    return kernel == [1, 1] and out == wide and groups == 1 and own == {name: plain[name] for name in own}


def _adapt(graph: ir.Graph, node: ir.Node, module: str, down: ir.Value, up: ir.Value) -> None:
    x, y, last = node.inputs[0], node.outputs[0], node
    assert x is not None
    readers = y.consumers()
    if node.op_type == "Conv" and len(readers) == 1 and readers[0].op_type == "Add":
        (last,) = readers
        y = last.outputs[0]
    kind = y.dtype or node.outputs[0].dtype or x.dtype or SINGLE
    made = Made(f"{LORA}{module}", kind)
    a, b = (value if value.dtype == kind else made("Cast", [value], to=int(kind)) for value in (down, up))
    if node.op_type == "MatMul":
        added = made("MatMul", [made("MatMul", [x, a]), b])
    else:
        added = _of_pixels(graph, made, x, y, a, b)
    total = made("Add", [y, added])
    total.shape = y.shape
    uses = [use for use in y.uses() if use.node not in made.nodes]
    for use in uses:
        use.node.replace_input_with(use.idx, total)
    for index, value in enumerate(graph.outputs):
        if value is y:
            graph.outputs[index] = total
            total.name, y.name = y.name, f"{y.name}.own"
    graph.insert_after(last, made.nodes)


def _of_pixels(graph: ir.Graph, made: Made, x: ir.Value, y: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """Return the product of (batch, channels, height, width), in y's shape.

    Its last node pools single pixels, which changes nothing. Through it ONNX Runtime's CPU provider keeps channels in
    blocks, as it does through convolutions; without it, sums that it fuses into convolutions would no longer be.
    """
    flat = constant(graph, "to_0_0_-1", np.array([0, 0, -1], np.int64))
    a, b = (made("Transpose", [value], perm=[0, 2, 1]) for value in (a, b))
    rows = made("MatMul", [b, made("MatMul", [a, made("Reshape", [x, flat])])])
    shape = made("Shape", [y])
    shape.dtype = ir.DataType.INT64
    added = made("Reshape", [rows, shape])
    added.shape = y.shape
    pooled = made("MaxPool", [added], kernel_shape=[1, 1])
    pooled.shape = y.shape
    return pooled


class Made:
    """New nodes of one name, in their order."""

    def __init__(self, name: str, dtype: ir.DataType) -> None:
        self._name, self._dtype = name, dtype
        self.nodes: list[ir.Node] = []

    def __call__(self, op: str, inputs: Sequence[ir.Value], **attributes: int | list[int]) -> ir.Value:
        node = ir.node(op, inputs, attributes=attributes, name=f"{self._name}.{op}.{len(self.nodes)}")
        self.nodes.append(node)
        result: ir.Value = node.outputs[0]
        result.name, result.dtype = node.name, self._dtype
        return result


def _input(
    graph: ir.Graph, name: str, shape: Sequence[int | str | ir.SymbolicDim], dtype: ir.DataType | None
) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype or SINGLE))
    graph.inputs.append(value)
    return value
