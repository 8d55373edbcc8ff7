"""Group norms in one node each: with SiLU, and with the sum in front of them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from latentrt_export.graphs.fused import rules
from latentrt_export.graphs.fused.edit import (
    CONTRIB,
    FLOATS,
    Editor,
    carried_bias,
    in_single,
    is_fixed,
    made_by,
    number,
    numbers,
    only_reader,
    same_sizes,
    sizes,
    take_biases,
    take_over,
)


def group_norms(model: ir.Model) -> int:
    """Fuse Shape, Reshape, InstanceNormalization, Reshape, Mul, Add, and a SiLU behind them, to GroupNorm.

    Six or eight nodes, of which four or six read and write the whole tensor, become one that reads it twice and writes
    it once. Its statistics are float32, as InstanceNormalization's are; gamma and beta are read in float32. The kernel
    wants channels last, so `channels_last` has to follow.

    Returns:
        How many norms were fused; those of sizes that the kernel refuses stay.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "InstanceNormalization"]:
        count += _fuse_norm(edit, node)
    edit.tidy()
    return count


def _fuse_norm(edit: Editor, node: ir.Node) -> bool:
    flat, back = made_by(node.inputs[0], "Reshape"), only_reader(node.outputs[0], "Reshape")
    if flat is None or back is None or not _is_neutral(node):
        return False
    x, target, shape = flat.inputs[0], numbers(flat.inputs[1]), made_by(back.inputs[1], "Shape")
    same = shape is not None and shape.inputs[0] is x and not {"start", "end"} & shape.attributes.keys()
    if not same or target is None or len(target) != 3 or target[0] != 0 or x.dtype not in FLOATS:
        return False
    groups, (_, channels, *rest) = int(target[1]), sizes(x)
    gamma, scaled = _affine(back.outputs[0], "Mul", channels, len(rest))
    beta, result = _affine(scaled, "Add", channels, len(rest))
    if gamma is None or beta is None or result is None or result.dtype != x.dtype or len(rest) not in (1, 2):
        return False
    if not isinstance(channels, int) or not rules.group_norm(channels, groups):
        return False
    silu = _silu(result)
    name = str(result.name)
    vectors = []
    for own, weight in ((f"{name}.gamma", gamma), (f"{name}.beta", beta)):
        stored = in_single(edit, node, weight, f"{own}.single")
        vectors.append(edit(node, "Reshape", [stored, edit.whole(channels)], own, [channels]))
    if len(rest) == 1:  # (batch, channels, tokens): as an image of one column
        x = edit(node, "Unsqueeze", [x, edit.whole(3)], f"{name}.column", (*x.shape, 1))
    options = {"epsilon": number(node, "epsilon", 1e-5), "groups": groups, "activation": int(silu is not None)}
    fused = edit(node, "GroupNorm", [x, *vectors], f"{name}.fused", x.shape, domain=CONTRIB, channels_last=0, **options)
    if len(rest) == 1:
        fused = edit(node, "Squeeze", [fused, edit.whole(3)], f"{name}.row", list(x.shape)[:3])
    take_over(fused, silu or result)
    return True


def _is_neutral(node: ir.Node) -> bool:
    """Return whether an InstanceNormalization scales by ones and adds zeros."""
    ones, zeros = (numbers(value) for value in node.inputs[1:])
    return ones is not None and zeros is not None and bool(np.all(ones == 1) and not np.any(zeros))


def _affine(value: ir.Value | None, op: str, channels: object, rest: int) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the weight for each channel that the one reader of a value multiplies or adds, and its result."""
    reader = only_reader(value, op) if value is not None else None
    if reader is not None:
        for weight in reader.inputs:
            if weight is not value and is_fixed(weight) and sizes(weight) == (channels, *[1] * rest):
                return weight, reader.outputs[0]
    return None, None


def _silu(value: ir.Value) -> ir.Value | None:
    """Return value · sigmoid(value), if that is all that a value is read for."""
    readers = {node for node, _ in value.uses()}
    sigmoid = next((node for node in readers if node.op_type == "Sigmoid"), None)
    product = only_reader(sigmoid.outputs[0], "Mul") if sigmoid is not None else None
    if sigmoid is None or product is None or value.is_graph_output() or readers != {sigmoid, product}:
        return None
    result: ir.Value = product.outputs[0]
    return result if set(product.inputs) == {value, sigmoid.outputs[0]} and result.dtype == value.dtype else None


def skip_group_norms(model: ir.Model) -> int:
    """Fuse the Add in front of a GroupNorm, and convolutions' biases in front of that, to SkipGroupNorm.

    The Add is a residual, or a time embedding for each channel. The norm's first reading of its input makes the sum,
    which others still read; cuDNN's separate kernel for the bias goes. The sum is rounded as before.

    Returns:
        How many Adds were fused.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "GroupNorm" and number(n, "channels_last", 1)]:
        add = made_by(node.inputs[0], "Add")
        if add is not None and (terms := _terms(add)):
            _fuse_sum(edit, node, add, *terms)
            count += 1
    edit.tidy()
    return count


def _terms(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Return what an Add sums as (x, skip): x of the sum's shape, skip of the same or one number for each channel.

    Of two, x is the one with a bias that can go into the norm, of a convolution of size 1 rather.
    """
    total = add.outputs[0]
    if len(sizes(total)) != 4 or total.dtype not in FLOATS:
        return None
    pairs = [(x, skip) for x, skip in (add.inputs, add.inputs[::-1]) if same_sizes(x, total)]
    pairs = [(x, skip) for x, skip in pairs if same_sizes(skip, total) or _for_each_channel(skip, x) is not None]
    pairs.sort(key=lambda pair: _rank(pair[0]))
    return pairs[0] if pairs else None


def _rank(x: ir.Value) -> int:
    if carried_bias(x) is None:
        return 2
    conv = made_by(x, "NhwcConv")
    return int(conv is not None and sizes(conv.inputs[1])[1:3] != (1, 1))


def _for_each_channel(skip: ir.Value, x: ir.Value) -> ir.Value | None:
    """Return the (batch, channels) value that `skip` is with two axes of 1 between."""
    node = made_by(skip, "Unsqueeze")
    if node is None or sizes(skip) != (sizes(x)[0], 1, 1, sizes(x)[3]) or len(sizes(node.inputs[0])) != 2:
        return None
    axes = numbers(node.inputs[1])
    return node.inputs[0] if axes is not None and sorted(axes.tolist()) == [1, 2] else None


def _fuse_sum(edit: Editor, norm: ir.Node, add: ir.Node, x: ir.Value, skip: ir.Value) -> None:
    inputs = [x, *norm.inputs[1:3], _for_each_channel(skip, x) or skip]
    if (bias := take_biases(edit, norm, x, skip)) is not None:
        inputs.append(bias)
    options = {name: norm.attributes[name].value for name in ("epsilon", "groups", "activation")}
    total, result = add.outputs[0], norm.outputs[0]
    kept = len(total.uses()) > 1 or total.is_graph_output()
    fused = ir.node(
        "SkipGroupNorm",
        inputs,
        attributes=options | {"channels_last": 1},
        domain=CONTRIB,
        num_outputs=1 + kept,
        name=f"{result.name}.fused",
    )
    edit.graph.insert_before(norm, fused)
    take_over(fused.outputs[0], result)
    if kept:
        take_over(fused.outputs[1], total)
