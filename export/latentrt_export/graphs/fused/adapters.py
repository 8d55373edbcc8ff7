"""LoRAs as inputs of a fused graph: as `graphs.parts.adapters`, where products stand as the passes have left them.

A product of three weights side by side (`packed_products`) has three sums, behind the Split. With channels last,
convolutions of one pixel read tokens in rows, so that theirs is a product as any other and nothing is transposed. Sums
stand before biases: what the passes have fused stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx_ir as ir

from latentrt_export.graphs.fused.edit import Editor, made_by, only_reader, sizes, split_bias
from latentrt_export.graphs.parts.adapters import declare_adapters, is_of_one_pixel

TURNS = ("Cast", "Transpose", "Reshape")  # between a weight's place in the file and the product


def read_adapters_fused(model: ir.Model) -> tuple[ir.Value, ...]:
    """Let a graph for ONNX Runtime's CUDA provider take LoRAs of each lane, in place.

    Args:
        model: as `for_cuda` writes it, with weights in safetensors.

    Returns:
        The new inputs, as `read_adapters` returns them.
    """
    edit = Editor(model)
    inputs: list[ir.Value] = []
    for node in list(model.graph):
        for weight, result in _products(node):
            down, up = declare_adapters(model.graph, weight)
            _adapt(edit, node, result, down, up)
            inputs += [down, up]
    edit.tidy()
    return tuple(inputs)


def _products(node: ir.Node) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Yield the weights of a product that LoRAs change, (out, in) or (out, in, 1, 1), each with what it gives."""
    if node.op_type not in ("MatMul", "NhwcConv") or len(sizes(node.inputs[0])) < 3:
        return
    joined = made_by(node.inputs[1], "Concat")
    values = [node.inputs[1]] if joined is None else list(joined.inputs)
    results = list(node.outputs) if joined is None else _parts(node.outputs[0])
    weights = [_weight(value) for value in values]
    for weight, result in zip(weights, results, strict=bool(results)):
        if weight is not None and _is_taken(node, weight):
            yield weight, result


def _parts(packed: ir.Value) -> list[ir.Value]:
    """Return what a joint product is split into, behind its bias if it has one."""
    reader = only_reader(packed)
    if reader is not None and reader.op_type == "Add" and split_bias(reader.outputs[0]) is not None:
        reader = only_reader(reader.outputs[0])
    return list(reader.outputs) if reader is not None and reader.op_type == "Split" else []


def _weight(value: ir.Value | None) -> ir.Value | None:
    """Return the weight in a file that a value is a turned form of."""
    while value is not None and (producer := value.producer()) is not None:
        if producer.op_type not in TURNS:
            return None
        value = producer.inputs[0]
    if value is None or not isinstance(value.const_value, ir.ExternalTensor):
        return None
    return value if str(value.name).endswith(".weight") else None


def _is_taken(node: ir.Node, weight: ir.Value) -> bool:
    return node.op_type == "MatMul" if len(sizes(weight)) == 2 else is_of_one_pixel(node, weight)


def _adapt(edit: Editor, node: ir.Node, y: ir.Value, down: ir.Value, up: ir.Value) -> None:
    x, name, kind = node.inputs[0], str(down.name).removesuffix(".down"), y.dtype
    assert x is not None

    def make(op: str, inputs: list[ir.Value], part: str, shape: Any = None, **attributes: Any) -> ir.Value:
        return edit(node, op, inputs, f"{name}.{part}", shape, dtype=kind, **attributes)

    if down.dtype != kind:
        down, up = (make("Cast", [value], f"{value.name}.cast", value.shape, to=kind) for value in (down, up))
    rows, image = x, len(sizes(x)) == 4
    if image:
        rows = make("Reshape", [x, edit.whole(0, -1, sizes(x)[-1])], "rows", (x.shape[0], None, x.shape[3]))
    narrow = make("MatMul", [rows, down], "narrow")
    added = make("MatMul", [narrow, up], "wide")
    if image:  # it keeps the channels
        sides = edit(node, "Shape", [x], f"{name}.sides", [4], dtype=ir.DataType.INT64)
        added = make("Reshape", [added, sides], "image", y.shape)
    total = make("Add", [y, added], "total", y.shape)
    _read_instead(total, y)


def _read_instead(total: ir.Value, y: ir.Value) -> None:
    """Let all that reads y read its sum with another instead, under y's name."""
    add, name = total.producer(), y.name
    y.name = f"{name}.own"
    ir.convenience.replace_all_uses_with(y, total, replace_graph_outputs=True)
    assert add is not None
    add.replace_input_with(0, y)
    total.name = name
