"""Bring what exporters spell out into the forms that export's passes know; numbers stay, to the last bits."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt_export.graphs import passes
from latentrt_export.graphs.fused.edit import Editor, is_vector, made_by, numbers, only_reader, same_sizes, take_over


def static_sizes(model: ir.Model) -> None:
    """Put numbers in the place of sides that are taken from shapes and do not change, in place."""
    for node in [node for node in model.graph if node.op_type == "Shape" and not node.attributes]:
        shape = node.inputs[0].shape
        for reader in list(node.outputs[0].consumers()) if shape is not None else ():
            sides = _picked(reader, list(shape))
            if sides is not None and all(isinstance(side, int) for side in sides):
                array = np.array(sides if reader.op_type == "Slice" else sides[0], np.int64)
                fixed = passes.constant(model.graph, f"{reader.outputs[0].name}.static", array)
                ir.convenience.replace_all_uses_with(reader.outputs[0], fixed)


def _picked(node: ir.Node, sides: list[Any]) -> list[Any] | None:
    """Return which sides Gather or Slice takes from a shape; None where that is not known."""
    given = [numbers(value) for value in node.inputs[1:]]
    if node.op_type == "Gather" and given[0] is not None and given[0].ndim == 0:
        return [sides[int(given[0])]]
    known = [int(array.item()) for array in given if array is not None and array.size == 1]
    if node.op_type == "Slice" and len(known) == len(given) < 4:
        return sides[known[0] : known[1]]
    return None


def fills(model: ir.Model) -> None:
    """Compute tensors of one number whose size is known, such as a mask before its triangle, in place."""
    for node in [node for node in model.graph if node.op_type == "ConstantOfShape"]:
        target, result = numbers(node.inputs[0]), node.outputs[0]
        if target is not None and np.prod(target) <= passes.FOLD_LIMIT:
            value = (
                node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1, np.float32)
            )
            fixed = passes.constant(model.graph, f"{result.name}.static", np.full(target, value.reshape(())))
            ir.convenience.replace_all_uses_with(result, fixed)


BROADCASTING = ("Add", "And", "Cast", "Mul", "Or", "Sub", "Where")


def drop_expansions(model: ir.Model) -> None:
    """Drop Expands of something to the batch where all that reads it would repeat it for each lane anyway, in place.

    What is behind one is then a constant, as a causal mask is.
    """
    for node in [node for node in model.graph if node.op_type == "Expand"]:
        before, after = node.inputs[0], node.outputs[0]
        if before.shape is None or after.shape is None or len(before.shape) != len(after.shape) or not before.shape:
            continue
        rest = list(before.shape)[1:] == list(after.shape)[1:]
        between = _until_repeated(after)
        if rest and before.shape[0] == 1 and between is not None:
            for value in between:
                value.shape = ir.Shape([1, *list(value.shape)[1:]])
            ir.convenience.replace_all_uses_with(after, before)


def _until_repeated(value: ir.Value) -> list[ir.Value] | None:
    """Return the values that would have one lane if `value` had; None if a reader needs all of its lanes."""
    found: list[ir.Value] = []
    for node in value.consumers():
        result = node.outputs[0]
        if value.is_graph_output() or node.op_type not in BROADCASTING or result.shape is None or not result.shape:
            return None
        shapes = [other.shape for other in node.inputs if other is not None and other is not value]
        if any(shape is not None and list(shape)[:1] == [result.shape[0]] for shape in shapes if len(shape or ()) > 1):
            continue
        if (behind := _until_repeated(result)) is None:
            return None
        found += [result, *behind]
    return found


def norms_of_their_own_shape(model: ir.Model) -> None:
    """Let every group norm go back to the shape of its own input, as `graphs.passes` writes it, in place."""
    edit = Editor(model)
    for node in [node for node in model.graph if node.op_type == "InstanceNormalization"]:
        flat, back = made_by(node.inputs[0], "Reshape"), only_reader(node.outputs[0], "Reshape")
        if flat is not None and back is not None and same_sizes(flat.inputs[0], back.outputs[0]):
            name = f"{back.outputs[0].name}.own_shape"
            rank = [len(flat.inputs[0].shape)]
            shape = edit(back, "Shape", [flat.inputs[0]], name, rank, dtype=ir.DataType.INT64)
            back.replace_input_with(1, shape)
    edit.tidy()


def flat_by_reshape(model: ir.Model) -> None:
    """Write Flatten as Reshape, which every runtime has for every type, in place."""
    edit = Editor(model)
    for node in [node for node in model.graph if node.op_type == "Flatten"]:
        x, axis = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else 1
        rest: list[Any] = list(x.shape)[axis:] if x.shape is not None and axis > 0 else [None]
        if all(isinstance(side, int) for side in rest):
            result, target = node.outputs[0], edit.whole(-1, math.prod(rest))
            take_over(edit(node, "Reshape", [x, target], f"{result.name}.flat", None), result)
    edit.tidy()


def fuse_layer_norm(model: ir.Model) -> None:
    """Write (x - mean) / √(variance + ε) · weight + bias over the last axis as LayerNormalization, in place."""
    edit = Editor(model)
    for divide in [node for node in model.graph if node.op_type == "Div"]:
        root, less = made_by(divide.inputs[1], "Sqrt"), made_by(divide.inputs[0], "Sub")
        shifted = made_by(root.inputs[0], "Add") if root is not None else None
        if less is None or shifted is None or not _is_mean(less.inputs[1], less.inputs[0]):
            continue
        epsilon, variance = numbers(shifted.inputs[1]), made_by(shifted.inputs[0], "ReduceMean")
        square = variance.inputs[0].producer() if variance is not None else None
        if epsilon is None or epsilon.size != 1 or square is None or not _is_mean(shifted.inputs[0], square.outputs[0]):
            continue
        of = less.outputs[0]
        squares = square.op_type == "Pow" and square.inputs[0] is of and _is(square.inputs[1], 2.0)
        if squares or (square.op_type == "Mul" and set(square.inputs) == {of}):
            _as_layer_norm(edit, divide, less.inputs[0], float(epsilon.reshape(())))
    edit.tidy()


def _is_mean(value: ir.Value, x: ir.Value) -> bool:
    """Return whether a value is the mean of another over the last axis, which it keeps."""
    node = made_by(value, "ReduceMean")
    axes = numbers(node.inputs[1]) if node is not None and len(node.inputs) > 1 else None
    if node is None or axes is None or axes.size != 1 or node.inputs[0] is not x or x.shape is None:
        return False
    kept = "keepdims" not in node.attributes or node.attributes["keepdims"].as_int() == 1
    return kept and int(axes.item()) in (-1, len(x.shape) - 1)


def _as_layer_norm(edit: Editor, divide: ir.Node, x: ir.Value, epsilon: float) -> None:
    scaled = only_reader(divide.outputs[0], "Mul")
    moved = only_reader(scaled.outputs[0], "Add") if scaled is not None else None
    if scaled is None or moved is None:
        return
    weight, bias = (
        next((value for value in node.inputs if is_vector(value, x.shape[-1])), None) for node in (scaled, moved)
    )
    if weight is not None and bias is not None:
        old, given = moved.outputs[0], [x, weight, bias]
        norm = edit(moved, "LayerNormalization", given, f"{old.name}.norm", x.shape, axis=-1, epsilon=epsilon)
        take_over(norm, old)


def fuse_gelu(model: ir.Model) -> None:
    """Write x · (1 + erf(x / √2)) / 2 as Gelu, in place."""
    edit = Editor(model)
    for erf in [node for node in model.graph if node.op_type == "Erf"]:
        divide, add = made_by(erf.inputs[0], "Div"), only_reader(erf.outputs[0], "Add")
        product = only_reader(add.outputs[0], "Mul") if add is not None else None
        if divide is None or add is None or product is None or not _is(divide.inputs[1], math.sqrt(2)):
            continue
        x, other = divide.inputs[0], next(value for value in product.inputs if value is not add.outputs[0])
        one = any(_is(value, 1.0) for value in add.inputs)
        if one and other is x:
            halved = only_reader(product.outputs[0], "Mul")
            if halved is not None and any(_is(value, 0.5) for value in halved.inputs):
                _as_gelu(edit, halved, x)
        elif one and (half := made_by(other, "Mul")) is not None and x in half.inputs and _halves(half):
            _as_gelu(edit, product, x)
    edit.tidy()


def _as_gelu(edit: Editor, last: ir.Node, x: ir.Value) -> None:
    result = last.outputs[0]
    take_over(edit(last, "Gelu", [x], f"{result.name}.gelu", x.shape), result)


def _halves(node: ir.Node) -> bool:
    return any(_is(value, 0.5) for value in node.inputs)


def _is(value: ir.Value | None, wanted: float) -> bool:
    """Return whether a value is a constant number, as float16 has it or better."""
    array = numbers(value)
    return array is not None and array.size == 1 and math.isclose(float(array.reshape(())), wanted, rel_tol=5e-4)


def split_halves(model: ir.Model) -> None:
    """Write two Slices that take the halves of the last axis as one Split, in place."""
    edit = Editor(model)
    for first in [node for node in model.graph if node.op_type == "Slice"]:
        x = first.inputs[0]
        width = x.shape[-1] if x.shape is not None else None
        if not isinstance(width, int) or width % 2 or _taken(first, len(x.shape)) != (0, width // 2):
            continue
        second = [node for node, _ in x.uses() if node.op_type == "Slice" and node is not first]
        second = [node for node in second if _taken(node, len(x.shape)) == (width // 2, width)]
        if len(second) != 1:
            continue
        split = ir.node("Split", [x], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{x.name}.halves")
        model.graph.insert_before(min((first, second[0]), key=list(model.graph).index), split)
        for value, old in zip(split.outputs, (first.outputs[0], second[0].outputs[0]), strict=True):
            take_over(value, old)
    edit.tidy()


def _taken(node: ir.Node, rank: int) -> tuple[int, int] | None:
    """Return from where to where a Slice takes the last axis; None if it does something else."""
    given = [numbers(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(array is None or array.size != 1 for array in given):
        return None
    start, end, axis, *step = (int(array.item()) for array in given if array is not None)
    width = node.inputs[0].shape[-1]
    return (start, min(end, width)) if axis in (-1, rank - 1) and step in ([], [1]) else None
