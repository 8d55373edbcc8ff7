"""Find attention in a graph that spells it out, and write it as one operator.

Older exporters write MatMul, Softmax, MatMul, with scale, heads split and merged around them. Runtimes have kernels for
opset 23's Attention, export's later passes know it, and it keeps no matrix of scores (`graphs.cpu_graph`).
https://onnx.ai/onnx/operators/onnx__Attention.html
"""

from __future__ import annotations

import math
from typing import NamedTuple

import onnx_ir as ir

from latentrt_export.graphs.fused.edit import made_by, numbers, only_reader, take_over
from latentrt_export.graphs.passes import constant, drop_unused

SWAP, KEYS = [0, 2, 1, 3], [0, 2, 3, 1]  # (batch, tokens, heads, size) to heads first; keys with tokens last

BLOCKS = -1e4  # added to a score, it leaves nothing of the token


class Heads(NamedTuple):
    """A value (batch, tokens, heads·size) that is split into heads, and the scale that is applied on the way."""

    value: ir.Value
    number: int
    size: int
    scale: float


def fuse_attention(model: ir.Model) -> int:
    """Write every attention as Attention over three axes, in place; return how many there were.

    A mask must be a constant that keeps or blocks tokens: added zeros and large negative numbers.

    Args:
        model: with the shapes of its values.
    """
    fused = [_fuse(model.graph, node) for node in list(model.graph) if node.op_type == "Softmax"]
    drop_unused(model)
    return sum(fused)


def _fuse(graph: ir.Graph, softmax: ir.Node) -> bool:
    scores, mask = _unmasked(graph, softmax.inputs[0])
    scores, scale = _scaled(scores)
    product = scores.producer()
    last = only_reader(softmax.outputs[0])
    merged = _merged(last.outputs[0]) if last is not None and last.op_type == "MatMul" else None
    if product is None or product.op_type != "MatMul" or merged is None or not _along_last(softmax):
        return False
    assert last is not None
    if last.inputs[0] is not softmax.outputs[0]:
        return False
    q, k, v = _split(product.inputs[0], SWAP), _keys(product.inputs[1]), _split(last.inputs[1], SWAP)
    if q is None or k is None or v is None or v.scale != 1.0 or {q.number, k.number, v.number} != {q.number}:
        return False
    _insert(graph, merged, (q, k, v), scale * q.scale * k.scale, mask)
    return True


def _insert(
    graph: ir.Graph, merged: ir.Value, heads: tuple[Heads, Heads, Heads], scale: float, mask: ir.Value | None
) -> None:
    q = heads[0]
    attributes: dict[str, int | float] = {"q_num_heads": q.number, "kv_num_heads": q.number}
    if not math.isclose(scale, 1 / math.sqrt(q.size), rel_tol=1e-6):  # Attention's own
        attributes["scale"] = scale
    producer = merged.producer()
    assert producer is not None
    inputs = [each.value for each in heads] + ([] if mask is None else [mask])
    node = ir.node("Attention", inputs, attributes, name=f"{merged.name}.attention")
    result = node.outputs[0]
    graph.insert_before(producer, node)
    take_over(result, merged)


def _unmasked(graph: ir.Graph, value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """Return scores before a mask, and the mask in booleans: true where a token is kept. None where there is none."""
    add = made_by(value, "Add")
    for scores, mask in (add.inputs, add.inputs[::-1]) if add is not None else ():
        array = numbers(mask)
        if array is not None and array.ndim == 4 and array.shape[:2] == (1, 1) and only_reader(scores) is not None:
            kept = array == 0
            if (array[~kept] < BLOCKS).all() and kept.any(axis=-1).all():
                return scores, constant(graph, f"{mask.name}.kept", kept)
    return value, None


def _scaled(value: ir.Value | None) -> tuple[ir.Value, float]:
    """Return what a value is a multiple of by a constant number, and that number."""
    assert value is not None
    node, scale = value.producer(), 1.0
    while node is not None and node.op_type in ("Mul", "Div") and only_reader(node.outputs[0]) is not None:
        factors = [_number(each) for each in node.inputs]
        if factors[1] is not None:
            scale, value = scale * (factors[1] if node.op_type == "Mul" else 1 / factors[1]), node.inputs[0]
        elif factors[0] is not None and node.op_type == "Mul":
            scale, value = scale * factors[0], node.inputs[1]
        else:
            break
        assert value is not None
        node = value.producer()
    return value, scale


def _number(value: ir.Value | None) -> float | None:
    tensor = value.const_value if value is not None else None
    if tensor is None or tensor.size != 1 or not tensor.dtype.is_floating_point():
        return None
    return float(tensor.numpy().reshape(()))


def _split(value: ir.Value | None, perm: list[int], scale: float = 1.0) -> Heads | None:
    """Return what Reshape and Transpose, and perhaps a scale, bring into the form that a MatMul reads."""
    value, own = _scaled(value)
    node = value.producer()
    reshape = node.inputs[0].producer() if node is not None and _transposes(node, perm) else None
    if reshape is None or reshape.op_type != "Reshape":
        return None
    source, halves = reshape.inputs[0], reshape.outputs[0].shape
    if source is None or source.shape is None or halves is None or len(source.shape) != 3 or len(halves) != 4:
        return None
    count, size, width = halves[2], halves[3], source.shape[2]
    kept = halves[0] == source.shape[0] and halves[1] == source.shape[1]
    if not kept or not isinstance(count, int) or not isinstance(size, int) or count * size != width:
        return None
    return Heads(source, count, size, own * scale)


def _keys(value: ir.Value | None) -> Heads | None:
    """Return the keys: transposed at once, or split as queries are and then turned."""
    value, scale = _scaled(value)
    if (at_once := _split(value, KEYS, scale)) is not None:
        return at_once
    node = value.producer()
    return _split(node.inputs[0], SWAP, scale) if node is not None and _transposes(node, [0, 1, 3, 2]) else None


def _merged(value: ir.Value) -> ir.Value | None:
    """Return (batch, tokens, heads·size) that Transpose and Reshape make of (batch, heads, tokens, size)."""
    swap = only_reader(value)
    reshape = only_reader(swap.outputs[0]) if swap is not None and _transposes(swap, SWAP) else None
    if swap is None or reshape is None or reshape.op_type != "Reshape":
        return None
    before, after = swap.outputs[0].shape, reshape.outputs[0].shape
    if before is None or after is None or len(after) != 3 or len(before) != 4:
        return None
    kept = before[0] == after[0] and before[1] == after[1]
    sizes = isinstance(before[2], int) and isinstance(before[3], int) and before[2] * before[3] == after[2]
    return reshape.outputs[0] if kept and sizes else None


def _transposes(node: ir.Node, perm: list[int]) -> bool:
    return node.op_type == "Transpose" and "perm" in node.attributes and list(node.attributes["perm"].as_ints()) == perm


def _along_last(softmax: ir.Node) -> bool:
    axis = softmax.attributes["axis"].as_int() if "axis" in softmax.attributes else -1
    shape = softmax.inputs[0].shape
    return axis == -1 or (shape is not None and axis == len(shape) - 1)
