"""A float32 graph whose large products are of 8-bit numbers, for ONNX Runtime on CPUs with instructions for them.

A weight has 255 steps, up to each output channel's largest. An activation has 256, of a range that was measured once
and is a constant of the graph. A range of a call's own numbers (DynamicQuantizeLinear) would be nearer, but it is that
of the whole batch: a lane would depend on the lanes beside it.

ONNX Runtime fuses QuantizeLinear, DequantizeLinear and the product between them to QLinearConv and MatMulIntegerToFloat
(https://onnxruntime.ai/docs/performance/model-optimizations/quantization.html). Weights stay in the safetensors as they
are: it computes scales and 8-bit weights when it loads the graph, also of weights that are replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from latentrt_export.graphs.fused.edit import SINGLE, Editor, is_fixed, sizes

Ranges = Mapping[str, tuple[float, float]]  # the least and the greatest number, by a tensor's name
AXES = {"Conv": (1, 2, 3), "MatMul": (0,)}  # of a weight, but that of the output channels
SMALLEST = 1e-30  # of a scale: a channel of zeros has none


def int8_path(path: str) -> str:
    """Return the path of the 8-bit graph of the graph at `path`: unet/model.onnx, unet/model.int8.onnx."""
    return str(PurePosixPath(path).with_suffix(".int8.onnx"))


def products(model: ir.Model) -> list[ir.Node]:
    """Return the nodes to compute with 8 bits: convolutions and products of tokens with weights.

    Not the first and the last convolution, which read and write latents, and not the convolutions of size 1 that lead
    around a block (those whose input others read too): they carry sums that no norm has scaled. Together these are a
    few percent of a UNet's arithmetic, and of the embedded model's loss the larger part (docs/speed.md).
    """
    common.ShapeInferencePass(data_prop=False)(model)
    found = [node for node in model.graph if node.op_type in AXES and _has_matrix(node)]
    convolutions = [node for node in model.graph if node.op_type == "Conv"]
    ends = {convolutions[0], convolutions[-1]} if convolutions else set()
    return [node for node in found if node not in ends and not _is_shortcut(node)]


def _has_matrix(node: ir.Node) -> bool:
    x, weight = node.inputs[:2]
    known = is_fixed(weight) and len(sizes(weight)) == len(AXES[node.op_type]) + 1
    return known and not is_fixed(x) and x.dtype == weight.dtype == SINGLE


def _is_shortcut(node: ir.Node) -> bool:
    readers = {reader for reader, _ in node.inputs[0].uses() if reader.op_type != "Shape"}
    return node.op_type == "Conv" and sizes(node.inputs[1])[2:] == (1, 1) and len(readers) > 1


def watched(model: ir.Model) -> tuple[str, ...]:
    """Return the names of the tensors whose ranges `to_int8` needs."""
    nodes = products(model)
    names = [node.inputs[0].name for node in nodes] + [n.outputs[0].name for n in nodes if n.op_type == "Conv"]
    return tuple(dict.fromkeys(names))


def to_int8(model: ir.Model, ranges: Ranges) -> int:
    """Let a float32 graph compute its large products with 8-bit numbers, in place; return how many.

    Args:
        model: a graph of a bundle, read with `onnx_ir.load`.
        ranges: of the tensors that are `watched`.
    """
    edit, nodes = Editor(model), products(model)
    rounded: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        x = node.inputs[0]
        if x not in rounded:
            rounded[x] = _round(edit, node, x, ranges[x.name])
        node.replace_input_with(0, rounded[x])
        node.replace_input_with(1, _round_weight(edit, node))
        if node.op_type == "Conv":  # QLinearConv writes 8 bits too
            y, uses = node.outputs[0], list(node.outputs[0].uses())
            result = _round(edit, uses[0].node, y, ranges[y.name])
            for reader, index in uses:
                reader.replace_input_with(index, result)
            rounded[result] = result
    edit.tidy()
    return len(nodes)


def _round(edit: Editor, before: ir.Node, x: ir.Value, range_: tuple[float, float]) -> ir.Value:
    """Round to the nearest of 256 steps from the least to the greatest number; zero is one of them."""
    low, high = min(range_[0], 0.0), max(range_[1], 0.0)
    step = max((high - low) / 255, SMALLEST)
    fixed = [edit.constant(np.array(f"{step:.5g}", np.float32)), edit.constant(np.array(round(-low / step), np.uint8))]
    steps = edit(before, "QuantizeLinear", [x, *fixed], f"{x.name}.steps", x.shape, dtype=ir.DataType.UINT8)
    return edit(before, "DequantizeLinear", [steps, *fixed], f"{x.name}.rounded", x.shape, dtype=SINGLE)


def _round_weight(edit: Editor, node: ir.Node) -> ir.Value:
    """Round a weight to 255 steps of each output channel, by nodes that a runtime computes when it loads the graph."""
    weight, name, axes = node.inputs[1], f"{node.outputs[0].name}.weight", AXES[node.op_type]
    (axis,) = set(range(len(axes) + 1)) - set(axes)
    channels = [sizes(weight)[axis]]
    positive = edit(node, "Abs", [weight], f"{name}.positive", weight.shape)
    largest = edit(node, "ReduceMax", [positive, edit.whole(*axes)], f"{name}.largest", channels, keepdims=0)
    step = edit(node, "Mul", [largest, edit.constant(np.array(1 / 127, np.float32))], f"{name}.step", channels)
    step = edit(node, "Max", [step, edit.constant(np.array(SMALLEST, np.float32))], f"{name}.scale", channels)
    fixed = [step, _zeros(edit, channels[0])]
    steps = edit(
        node, "QuantizeLinear", [weight, *fixed], f"{name}.steps", weight.shape, dtype=ir.DataType.INT8, axis=axis
    )
    return edit(node, "DequantizeLinear", [steps, *fixed], f"{name}.rounded", weight.shape, dtype=SINGLE, axis=axis)


def _zeros(edit: Editor, size: int) -> ir.Value:
    """Return the graph's initializer of that many 8-bit zeros; make it if missing."""
    name = f"zeros_int8_{size}"
    if name not in edit.graph.initializers:
        tensor = ir.tensor(np.zeros(size, np.int8), name=name)
        edit.graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape([size]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return edit.graph.initializers[name]
