"""Rewrites that turn a traced graph into a lean one. Each changes an `onnx_ir` model in place.

`clean` runs the ones that change structure in the order that works; `weights.py` then shares the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray
from onnxscript import optimizer, rewriter
from onnxscript.rewriter.rules import common as rules

Sizes = tuple[int | ir.SymbolicDim, ...]
PREFIX = "model."  # of a weight's name in a graph; the rest is its name in the checkpoint
FOLD_LIMIT = 16_384  # elements: enough for a causal mask of 77 x 77
NO_OPS = (
    *rules.mul_by_1_rule.commute(),
    rules.div_by_1_rule,
    rules.no_op_cast_rule,
    rules.collapse_slice_rule,
    rules.unsqueeze_unsqueeze_rule,
)


def clean(model: ir.Model) -> None:
    """Run every rewrite of this file, in order."""
    strip_metadata(model)
    fold_constants(model)
    drop_no_ops(model)
    static_reshapes(model)
    flatten_attention(model)
    decompose_group_norm(model)
    drop_unused(model)


def strip_metadata(model: ir.Model) -> None:
    """Drop the tracer's notes (stack traces, module names, paths of the exporting machine).

    They are nine tenths of a traced graph's bytes, differ from machine to machine and tell a bundle's reader nothing.
    """
    common.ClearMetadataAndDocStringPass()(model)
    model.metadata_props.clear()
    for value in _values(model.graph):
        value.metadata_props.clear()
        value.doc_string = None


def fold_constants(model: ir.Model) -> None:
    """Compute what depends on constants only, never on weights: a folded weight would not be in the safetensors."""

    def should_fold(node: ir.Node) -> bool | None:
        return False if any(v is not None and is_weight(v) for v in node.inputs) else None

    optimizer.fold_constants(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT, should_fold=should_fold)
    drop_unused(model)


def drop_no_ops(model: ir.Model) -> None:
    """Drop multiplications by one, slices of everything and the like, which diffusers' options leave behind."""
    rewriter.rewrite(model, pattern_rewrite_rules=NO_OPS)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    drop_unused(model)


def static_reshapes(model: ir.Model) -> None:
    """Give every Reshape a constant target (0: unchanged, -1: the rest), or the Shape of a value it returns to.

    The tracer computes targets from the inputs' sizes with a chain of integer operations: small nodes that every call
    pays for and that keep a runtime from seeing that only batch, height and width are free.
    """
    graph, first_of_shape = model.graph, dict[Sizes, ir.Value]()
    for node in list(graph):
        if node.op_type == "Reshape" and all(v and v.shape is not None for v in (node.inputs[0], node.outputs[0])):
            _make_static(graph, node, first_of_shape)
        for value in node.outputs:
            if value.shape is not None:
                first_of_shape.setdefault(_shape(value), value)


def _make_static(graph: ir.Graph, node: ir.Node, first_of_shape: dict[Sizes, ir.Value]) -> None:
    result = node.outputs[0]
    before, after = _shape(node.inputs[0]), _shape(result)
    target = [
        size if isinstance(size, int) else 0 if before[i : i + 1] == (size,) else -1 for i, size in enumerate(after)
    ]
    if target.count(-1) <= 1:
        shape = constant(graph, "to_" + "_".join(map(str, target)), np.array(target, np.int64))
    elif after in first_of_shape:
        twin = first_of_shape[after]
        shape = _insert(graph, node, "Shape", [twin], f"{result.name}.shape")
    else:
        return
    node.replace_input_with(1, shape)
    node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def flatten_attention(model: ir.Model) -> None:
    """Let Attention split and merge its heads itself: Reshape and Transpose around each of its tensors go.

    Opset 23's Attention takes (batch, tokens, heads·size) together with the number of heads.
    """
    for node in [n for n in model.graph if n.op_type == "Attention"]:
        sources = [_before_split(value) for value in node.inputs[:3]]
        merged = _after_merge(node.outputs[0])
        if merged is None or any(s is None for s in sources):
            continue
        for i, source in enumerate(sources):
            heads = _shape(node.inputs[i])[1]
            assert isinstance(heads, int)
            name = "q_num_heads" if i == 0 else "kv_num_heads"
            node.attributes[name] = ir.AttrInt64(name, heads)
            node.replace_input_with(i, source)
        _take_over(node.outputs[0], merged)
    drop_unused(model)


def _before_split(value: ir.Value | None) -> ir.Value | None:
    """Return the (batch, tokens, dim) value that Reshape and Transpose made into this (batch, heads, tokens, size)."""
    transpose = value.producer() if value is not None else None
    if transpose is None or not _is_swap(transpose) or transpose.inputs[0] is None:
        return None
    reshape = transpose.inputs[0].producer()
    if reshape is None or reshape.op_type != "Reshape":
        return None
    return reshape.inputs[0] if len(_shape(reshape.inputs[0])) == 3 else None


def _after_merge(value: ir.Value) -> ir.Value | None:
    """Return the (batch, tokens, dim) value that Transpose and Reshape make of this (batch, heads, tokens, size)."""
    nodes = value.consumers()
    if len(nodes) != 1 or not _is_swap(nodes[0]):
        return None
    nodes = nodes[0].outputs[0].consumers()
    return nodes[0].outputs[0] if len(nodes) == 1 and nodes[0].op_type == "Reshape" else None


def _is_swap(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def decompose_group_norm(model: ir.Model) -> None:
    """Rewrite GroupNormalization as InstanceNormalization over groups, then scale and bias, where it has weights.

    ONNX Runtime has no CPU kernel for GroupNormalization: it inlines the specification's function, some 18 nodes, which
    made loading a small UNet more than twice as slow and each call a tenth slower (docs/export.md).
    """
    for node in [n for n in model.graph if n.op_type == "GroupNormalization"]:
        _decompose(model.graph, node)


def _decompose(graph: ir.Graph, node: ir.Node) -> None:
    x, scale, bias = (value for value in node.inputs if value is not None)
    result, groups = node.outputs[0], node.attributes["num_groups"].as_int()
    ones = constant(graph, f"ones_{groups}", np.ones(groups, np.float32))
    zeros = constant(graph, f"zeros_{groups}", np.zeros(groups, np.float32))
    flat = constant(graph, f"to_0_{groups}_-1", np.array([0, groups, -1], np.int64))
    name = result.name

    def insert(op: str, *inputs: ir.Value, **attributes: float) -> ir.Value:
        return _insert(graph, node, op, inputs, f"{name}.{op}", **attributes)

    shape = insert("Shape", x)
    grouped = insert("Reshape", x, flat)
    normal = insert("InstanceNormalization", grouped, ones, zeros, epsilon=node.attributes["epsilon"].as_float())
    made = _insert(graph, node, "Reshape", [normal, shape], f"{name}.back")
    if not (_is_filled(scale) and _is_filled(bias)):  # the tracer fills in ones and zeros where a norm has no weights
        for weight in (scale, bias):
            _append_axes(weight, len(_shape(x)) - 2)
        made = insert("Add", insert("Mul", made, scale), bias)
    _take_over(made, result)
    graph.remove(node, safe=True)


def _is_filled(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "ConstantOfShape"


def _append_axes(weight: ir.Value, count: int) -> None:
    """Make a weight (channels,) a (channels, 1, ...): same bytes, but it broadcasts over the axes behind."""
    assert weight.const_value is not None
    if len(weight.const_value.shape) == 1:
        array = weight.const_value.numpy()
        weight.const_value = ir.tensor(array.reshape(-1, *[1] * count), name=weight.name)
        weight.shape = ir.Shape(weight.const_value.shape)


def drop_unused(model: ir.Model) -> None:
    """Drop nodes and initializers that no output needs, and compute equal expressions once."""
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def is_weight(value: ir.Value) -> bool:
    """Return whether a value is a parameter or buffer of the traced module (and not a constant of the graph)."""
    return value.is_initializer() and (value.name or "").startswith(PREFIX)


def constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """Return the graph's initializer of that name; make it if missing."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.register_initializer(
            ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        )
    return graph.initializers[name]


def _shape(value: ir.Value | None) -> Sizes:
    """Return the shape that the tracer found; it finds every one."""
    assert value is not None
    assert value.shape is not None
    return tuple(value.shape)


def _insert(
    graph: ir.Graph, before: ir.Node, op: str, inputs: Sequence[ir.Value], name: str, **attributes: float
) -> ir.Value:
    node = ir.node(op, inputs, attributes=attributes, name=name)
    result: ir.Value = node.outputs[0]
    result.name = name
    graph.insert_before(before, node)
    return result


def _take_over(new: ir.Value, old: ir.Value) -> None:
    """Put `new` in the place of `old`, under the same name."""
    new.shape, new.type = old.shape, old.type
    name, old.name = old.name, f"{old.name}.old"
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    new.name = name


def _values(graph: ir.Graph) -> list[ir.Value]:
    made = [value for node in graph for value in node.outputs]
    return [*graph.inputs, *graph.initializers.values(), *made]
