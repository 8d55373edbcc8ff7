"""Two more inputs of a text encoder: vectors in the place of tokens, and which tokens are attended to.

| input | type | meaning |
| --- | --- | --- |
| "vectors" (batch, tokens, dim) | float | stand where an id is beyond the vocabulary |
| "attention_mask" (batch, tokens) | int64 | 1 for tokens that others attend to, 0 for those that they do not |

With ids of the vocabulary alone and a mask of ones, the numbers are those of the graph before, to the bit.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from latentrt_export.graphs.passes import constant

IDS, VECTORS, MASK = "input_ids", "vectors", "attention_mask"
INT, BOOL = ir.DataType.INT64, ir.DataType.BOOL


def add_text_inputs(model: ir.Model) -> None:
    """Add both inputs to the traced graph of a text encoder, in place; the mask where attention has one already."""
    graph = model.graph
    (ids,) = (value for value in graph.inputs if value.name == IDS)
    for node in list(graph):
        if node.op_type == "Gather" and node.inputs[0].is_initializer() and _follows(node.inputs[1], ids):
            _add_vectors(graph, node)
            break
    attentions = [node for node in graph if node.op_type == "Attention"]
    masks = {node.inputs[3] if len(node.inputs) > 3 else None for node in attentions}
    if len(masks) == 1 and (mask := masks.pop()) is not None and mask.dtype == BOOL:
        _add_mask(graph, ids, mask, attentions)


def _follows(value: ir.Value, ids: ir.Value) -> bool:
    """Return whether a value is the ids, or a Reshape of them."""
    while (node := value.producer()) is not None and node.op_type == "Reshape":
        value = node.inputs[0]
    return value is ids


def _add_vectors(graph: ir.Graph, gather: ir.Node) -> None:
    """Let a Gather of the table read row 0 for ids beyond it, and put the vectors there."""
    table, ids, found = gather.inputs[0], gather.inputs[1], gather.outputs[0]
    size, dim = table.shape
    batch, tokens = ids.shape
    vectors = _input(graph, VECTORS, ir.DataType.FLOAT, (batch, tokens, dim))
    last = constant(graph, "vocabulary", np.array(size, np.int64))
    zero, axis = constant(graph, "no_id", np.array(0, np.int64)), constant(graph, "axis_-1", np.array([-1], np.int64))
    own = _node(graph, gather, "Less", [ids, last], "own_ids", BOOL, (batch, tokens))
    known = _node(graph, gather, "Where", [own, ids, zero], "known_ids", INT, (batch, tokens))
    gather.replace_input_with(1, known)
    column = _node(graph, gather, "Unsqueeze", [own, axis], "own_ids.column", BOOL, (batch, tokens, 1))
    chosen = ir.node("Where", [column, found, vectors], name="tokens_or_vectors")
    result = chosen.outputs[0]
    result.name, result.dtype, result.shape = "tokens_or_vectors", found.dtype, found.shape
    ir.convenience.replace_all_uses_with(found, result)
    chosen.replace_input_with(1, found)
    graph.insert_after(gather, chosen)


def _add_mask(graph: ir.Graph, ids: ir.Value, mask: ir.Value, attentions: list[ir.Node]) -> None:
    """Let attention see what the mask allows and the new input too."""
    batch, tokens = ids.shape
    attended = _input(graph, MASK, INT, (batch, tokens))
    axes = constant(graph, "axes_1_2", np.array([1, 2], np.int64))
    first = attentions[0]
    seen = ir.node("Cast", [attended], {"to": BOOL}, name="attended")
    graph.insert_before(first, seen)
    seen.outputs[0].name, seen.outputs[0].dtype, seen.outputs[0].shape = "attended", BOOL, ir.Shape((batch, tokens))
    keys = _node(graph, first, "Unsqueeze", [seen.outputs[0], axes], "attended.keys", BOOL, (batch, 1, 1, tokens))
    both = _node(graph, first, "And", [mask, keys], "attended.mask", BOOL, tuple(mask.shape))
    for node in attentions:
        node.replace_input_with(3, both)


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[object, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _node(
    graph: ir.Graph,
    before: ir.Node,
    op: str,
    inputs: list[ir.Value],
    name: str,
    dtype: ir.DataType,
    shape: tuple[object, ...],
) -> ir.Value:
    node = ir.node(op, inputs, name=name)
    graph.insert_before(before, node)
    result: ir.Value = node.outputs[0]
    result.name, result.dtype, result.shape = name, dtype, ir.Shape(shape)
    return result
