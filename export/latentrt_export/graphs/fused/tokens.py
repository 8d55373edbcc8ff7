"""What surrounds the products of transformer blocks: biases, residuals, norms and gates, in fewer nodes.

A MatMul of three axes has no bias, so export writes MatMul, Add, and an Add for the residual. Each reads and writes the
whole tensor.
"""

from __future__ import annotations

import onnx_ir as ir

from latentrt_export.graphs.fused import rules
from latentrt_export.graphs.fused.edit import (
    CONTRIB,
    FLOATS,
    Editor,
    biased,
    carried_bias,
    is_vector,
    made_by,
    number,
    numbers,
    only_reader,
    same_sizes,
    sizes,
    split_bias,
    sum_of_biases,
    take_biases,
    take_over,
)

ERF = ("none", b"none")
SUM = 3  # SkipLayerNormalization's output with what it normalizes


def skip_layer_norms(model: ir.Model) -> int:
    """Fuse a residual's Add, and the bias in front of it, with the LayerNormalization behind it.

    Three nodes that each read and write the whole tensor become one, which also gives the sum to the next residual.
    With the provider's option `enable_skip_layer_norm_strict_mode` its statistics are float32, as
    LayerNormalization's are; without it they are sums of squares in float16.

    Returns:
        How many norms were fused.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "LayerNormalization"]:
        add = made_by(node.inputs[0], "Add")
        if add is not None and _is_token_norm(node) and all(same_sizes(x, add.outputs[0]) for x in add.inputs):
            _fuse_norm(edit, node, add)
            count += 1
    edit.tidy()
    return count


def _is_token_norm(node: ir.Node) -> bool:
    x = node.inputs[0]
    last = int(number(node, "axis", -1)) in (-1, len(sizes(x)) - 1)
    whole = len(node.inputs) == 3 and all(value.dtype == x.dtype for value in (*node.inputs, node.outputs[0]))
    plain = all(not value.uses() for value in node.outputs[1:])
    return last and whole and plain and len(sizes(x)) == 3 and x.dtype in FLOATS


def _fuse_norm(edit: Editor, node: ir.Node, add: ir.Node) -> None:
    _, gamma, beta = node.inputs
    x, skip, bias = _with_bias(add)
    total, result = add.outputs[0], node.outputs[0]
    kept = len(total.uses()) > 1 or total.is_graph_output()
    fused = ir.node(
        "SkipLayerNormalization",
        [x, skip, gamma, beta, *([] if bias is None else [bias])],
        attributes={"epsilon": number(node, "epsilon", 1e-5)},
        domain=CONTRIB,
        num_outputs=1 + SUM * kept,
        name=f"{result.name}.fused",
    )
    edit.model.opset_imports[CONTRIB] = 1
    edit.graph.insert_before(node, fused)
    take_over(fused.outputs[0], result)
    if kept:
        for unused in fused.outputs[1:SUM]:
            unused.name = ""
        take_over(fused.outputs[SUM], total)


def _with_bias(add: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value | None]:
    """Return x, y and b of an Add that sums (x + b) + y; b is None if it sums x + y."""
    for one, other in (add.inputs, add.inputs[::-1]):
        if (parts := split_bias(one)) is not None:
            return parts[0], other, parts[1]
    return add.inputs[0], add.inputs[1], None


def layer_norm_biases(model: ir.Model) -> int:
    """Take the bias in front of a transformer's tokens (its proj_in) into the two norms that read them.

    The bias is a kernel that reads and writes all tokens: an Add, or cuDNN's behind a convolution. Two nodes read the
    tokens. One is the SkipLayerNormalization behind the attention, as its residual: b is added to the bias that it has.
    The other is a LayerNormalization. Its result changes with a factor only by its epsilon, so that of x + b is the
    SkipLayerNormalization of x and x with the bias 2b and four times the epsilon: doubling is exact, and x comes from
    the cache the second time. A convolution without its bias then becomes a MatMul (`pointwise_products`).

    Returns:
        How many biases were taken.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "LayerNormalization"]:
        residual = _residual_of(node) if _is_token_norm(node) else None
        if residual is not None and (parts := _take_bias_of_tokens(node.inputs[0])) is not None:
            _share_bias(edit, node, residual, *parts)
            count += 1
    edit.tidy()
    return count


def _residual_of(norm: ir.Node) -> ir.Node | None:
    """Return the SkipLayerNormalization that alone reads, once, what a norm reads."""
    tokens = norm.inputs[0]
    others = [use.node for use in tokens.uses() if use.node is not norm]
    if len(others) != 1 or len(tokens.uses()) != 2 or tokens.is_graph_output():
        return None
    return others[0] if others[0].op_type == "SkipLayerNormalization" and tokens in others[0].inputs[:2] else None


def _take_bias_of_tokens(tokens: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Return tokens without their bias, and the bias; that of a convolution in front of them is taken off it."""
    if (parts := biased(tokens)) is not None:
        return parts
    reshape = made_by(tokens, "Reshape")
    conv = made_by(reshape.inputs[0], "NhwcConv") if reshape is not None else None
    if conv is None or len(conv.inputs) != 3:
        return None
    bias, image = conv.inputs[2], conv.outputs[0]
    readers = [node for node, _ in image.uses() if node.op_type != "Shape"]  # which has the sizes for the way back
    if readers != [reshape] or image.is_graph_output() or not is_vector(bias, sizes(tokens)[-1]):
        return None
    conv.resize_inputs(2)
    return tokens, bias


def _share_bias(edit: Editor, norm: ir.Node, residual: ir.Node, x: ir.Value, bias: ir.Value) -> None:
    residual.replace_input_with(list(residual.inputs[:2]).index(norm.inputs[0]), x)
    if len(residual.inputs) == 5:
        residual.replace_input_with(4, sum_of_biases(edit, residual, [residual.inputs[4], bias]))
    else:
        residual.resize_inputs(5)
        residual.replace_input_with(4, bias)
    result = norm.outputs[0]
    inputs = [x, x, *norm.inputs[1:3], sum_of_biases(edit, norm, [bias, bias])]
    epsilon = 4 * number(norm, "epsilon", 1e-5)
    fused = edit(
        norm, "SkipLayerNormalization", inputs, f"{result.name}.fused", result.shape, domain=CONTRIB, epsilon=epsilon
    )
    take_over(fused, result)


def bias_split_gelus(model: ir.Model) -> int:
    """Fuse the bias, Split, Gelu and Mul of a gated feed-forward (GEGLU) to BiasSplitGelu.

    The widest tensors of the network, eight times the channels, are read once and not five times. Inside, the sum is
    rounded as before and the rest is float32.

    Returns:
        How many gates were fused; those of sizes that the kernel refuses stay.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "Split"]:
        count += _fuse_gate(edit, node)
    edit.tidy()
    return count


def _fuse_gate(edit: Editor, split: ir.Node) -> bool:
    wide = split.inputs[0]
    size, parts = (sizes(wide) or (None,))[-1], split_bias(wide)
    if parts is None or len(split.outputs) != 2 or len(sizes(wide)) != 3 or size not in rules.GEGLU_SIZES:
        return False
    left, right = split.outputs
    gelu, product = only_reader(right, "Gelu"), only_reader(left, "Mul")
    halves = int(number(split, "axis", 0)) in (2, -1) and sizes(left) == sizes(right)
    if not halves or gelu is None or product is None or gelu.outputs[0] not in product.inputs:
        return False
    if number(gelu, "approximate", 0) not in (0, *ERF):
        return False
    result = product.outputs[0]
    if only_reader(gelu.outputs[0]) is None or {v.dtype for v in (*parts, wide, result)} - {wide.dtype}:
        return False
    take_over(edit(split, "BiasSplitGelu", parts, f"{result.name}.fused", result.shape, domain=CONTRIB), result)
    return True


def bias_gelus(model: ir.Model) -> int:
    """Fuse the bias and Gelu of a text encoder's feed-forward to BiasGelu.

    Returns:
        How many were fused.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "Gelu"]:
        parts, result = split_bias(node.inputs[0]), node.outputs[0]
        if parts is not None and number(node, "approximate", 0) in (0, *ERF) and parts[0].dtype == result.dtype:
            take_over(edit(node, "BiasGelu", parts, f"{result.name}.fused", result.shape, domain=CONTRIB), result)
            count += 1
    edit.tidy()
    return count


def bias_adds(model: ir.Model) -> int:
    """Fuse a bias and the residual behind it to BiasAdd, where no norm took them: behind MatMul and NhwcConv.

    A convolution's bias is a kernel of its own in ONNX Runtime, unless its option `fuse_conv_bias` works. BiasAdd wants
    three axes: images are reshaped, which moves no data.

    Returns:
        How many were fused; those of sizes that the kernel refuses stay.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "Add"]:
        total = node.outputs[0]
        known = same_sizes(*node.inputs) and same_sizes(node.inputs[0], total) and total.dtype in FLOATS
        fuse_one = {3: _fuse_tokens, 4: _fuse_image}.get(len(sizes(total)))
        if fuse_one is not None and known and sizes(total)[-1] in rules.BIAS_ADD_SIZES:
            count += fuse_one(edit, node)
    edit.tidy()
    return count


def _fuse_tokens(edit: Editor, add: ir.Node) -> bool:
    x, skip, bias = _with_bias(add)
    result = add.outputs[0]
    if bias is None:
        return False
    take_over(edit(add, "BiasAdd", [x, bias, skip], f"{result.name}.fused", result.shape, domain=CONTRIB), result)
    return True


def _fuse_image(edit: Editor, add: ir.Node) -> bool:
    x, skip = add.inputs if carried_bias(add.inputs[0]) is not None else add.inputs[::-1]
    bias = take_biases(edit, add, x, skip)
    if bias is None:
        return False
    result = add.outputs[0]
    name, size = str(result.name), sizes(result)[-1]
    flat, row = edit.whole(0, -1, size), (result.shape[0], None, size)
    rows = [edit(add, "Reshape", [v, flat], f"{name}.{part}", row) for v, part in ((x, "x"), (skip, "skip"))]
    fused = edit(add, "BiasAdd", [rows[0], bias, rows[1]], f"{name}.rows", row, domain=CONTRIB)
    shape = edit(add, "Shape", [skip], f"{name}.sizes", [4], dtype=ir.DataType.INT64)
    take_over(edit(add, "Reshape", [fused, shape], f"{name}.image", result.shape), result)
    return True


def pointwise_products(model: ir.Model) -> int:
    """Turn each NhwcConv of size 1 without a bias into a MatMul.

    With channels last it is one; cuBLAS has more and better kernels for it than cuDNN's heuristics choose from. One
    with a bias stays: the bias would become a node.

    Returns:
        How many were turned.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "NhwcConv"]:
        weight = made_by(node.inputs[1], "Transpose")
        if weight is None or not _is_pointwise(node):
            continue
        result, (out, inner, *_) = node.outputs[0], sizes(weight.inputs[0])
        matrix = edit(
            node, "Reshape", [weight.inputs[0], edit.whole(out, inner)], f"{result.name}.matrix", [out, inner]
        )
        turned = edit(node, "Transpose", [matrix], f"{result.name}.turned", [inner, out], perm=[1, 0])
        take_over(edit(node, "MatMul", [node.inputs[0], turned], f"{result.name}.product", result.shape), result)
        count += 1
    edit.tidy()
    return count


def _is_pointwise(node: ir.Node) -> bool:
    def all_are(name: str, wanted: int) -> bool:
        return name not in node.attributes or all(x == wanted for x in node.attributes[name].as_ints())

    one = sizes(node.inputs[1])[1:3] == (1, 1) and all_are("strides", 1) and number(node, "group", 1) == 1
    return (
        len(node.inputs) == 2 and one and all_are("pads", 0) and number(node, "auto_pad", 0) in (0, "NOTSET", b"NOTSET")
    )


def quick_gelus(model: ir.Model) -> int:
    """Fuse x · sigmoid(alpha · x) to QuickGelu: the time embedding's SiLU, that of norms that stay, CLIP's activation.

    Returns:
        How many were fused.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "Sigmoid"]:
        product = only_reader(node.outputs[0], "Mul")
        if product is None or node.inputs[0].dtype not in FLOATS:
            continue
        x, alpha = _scaled(node.inputs[0], product)
        result = product.outputs[0]
        if x is None or {x.dtype, result.dtype} != {node.inputs[0].dtype}:
            continue
        fused = edit(node, "QuickGelu", [x], f"{result.name}.fused", result.shape, domain=CONTRIB, alpha=alpha)
        take_over(fused, result)
        count += 1
    edit.tidy()
    return count


def _scaled(inner: ir.Value, product: ir.Node) -> tuple[ir.Value | None, float]:
    """Return x and alpha if `inner` is alpha · x and x is what `product` multiplies the sigmoid with."""
    if inner in product.inputs:
        return inner, 1.0
    scale = made_by(inner, "Mul")
    for x, factor in (scale.inputs, scale.inputs[::-1]) if scale is not None else ():
        value = numbers(factor)
        if x in product.inputs and value is not None and value.size == 1 and only_reader(inner) is not None:
            return x, float(value.reshape(-1)[0])
    return None, 0.0
