"""The three products in front of self attention as one."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from latentrt_export.graphs.fused.edit import Editor, is_fixed, made_by, only_reader, sizes, split_bias

QKV = 3


def packed_products(model: ir.Model) -> int:
    """Compute q, k and v of a self attention with one MatMul, and split its result.

    Three products each fill a part of a GPU. The joint weight is a Concat of the three, which a runtime computes when
    it loads the graph: nothing is stored twice. MultiHeadAttention's own packed format (batch, tokens, heads, 3, size)
    is no gain: flash and memory-efficient attention first unpack it with a kernel like Split's
    (contrib_ops/cuda/bert/attention_prepare_qkv.cu, PrepareQkv_MHA_PackedQKV).

    Returns:
        How many attentions were changed.
    """
    edit, count = Editor(model), 0
    for node in [n for n in model.graph if n.op_type == "MultiHeadAttention"]:
        parts = [_product(value) for value in node.inputs[:QKV]]
        if len(node.inputs) == QKV and all(parts):
            count += _pack(edit, node, [part for part in parts if part])
    edit.tidy()
    return count


def _product(value: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Return x, W and b of a value x · W + b that is read once; b may be None."""
    if value is None or only_reader(value) is None:
        return None
    product, bias = split_bias(value) or (value, None)
    node = made_by(product, "MatMul")
    if node is None or only_reader(product) is None or not is_fixed(node.inputs[1]) or len(sizes(node.inputs[1])) != 2:
        return None
    return node.inputs[0], node.inputs[1], bias


def _pack(edit: Editor, node: ir.Node, parts: Sequence[tuple[ir.Value, ir.Value, ir.Value | None]]) -> bool:
    sources, weights, biases = zip(*parts, strict=True)
    one = len(set(sources)) == 1 and len({(sizes(w), w.dtype) for w in weights}) == 1
    if not one or len({bias is None for bias in biases}) != 1:
        return False
    x, (inner, size), name = sources[0], sizes(weights[0]), str(node.outputs[0].name)
    shape = [*list(x.shape)[:-1], QKV * size]
    weight = edit(node, "Concat", weights, f"{name}.weights", [inner, QKV * size], axis=1)
    packed = edit(node, "MatMul", [x, weight], f"{name}.packed", shape)
    if biases[0] is not None:
        bias = edit(node, "Concat", biases, f"{name}.biases", [QKV * size], axis=0)
        packed = edit(node, "Add", [packed, bias], f"{name}.biased", shape)
    split = ir.node(
        "Split", [packed], attributes={"axis": 2, "num_outputs": QKV}, num_outputs=QKV, name=f"{name}.split"
    )
    edit.graph.insert_before(node, split)
    for index, (value, part) in enumerate(zip(split.outputs, "qkv", strict=True)):
        value.name, value.dtype, value.shape = f"{name}.{part}", x.dtype, ir.Shape([*list(x.shape)[:-1], size])
        node.replace_input_with(index, value)
    return True
