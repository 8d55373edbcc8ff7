"""Lower a graph of opset 23 to opset 18, for older parsers: TensorRT 10.x.

Attention becomes MatMul, Softmax, MatMul, and Gelu its formula. Every other operator of latentrt's graphs is the same
in opset 18; later versions added types and attributes (`saturate`, `allowzero` aside) that these graphs do not use.
https://onnx.ai/onnx/operators/onnx__Attention.html, https://onnx.ai/onnx/operators/onnx__Gelu.html
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from latentrt.errors import ExportError

IR_VERSION = 8  # of the ONNX release that had opset 18; older parsers refuse newer files
GELU_SINCE, ATTENTION_SINCE = 20, 23
# Attributes that are newer than opset 18, and the value at which they have opset 18's meaning.
YOUNGER: Mapping[str, Mapping[str, Any]] = {"Cast": {"saturate": 1, "round_mode": "up"}}
SCORES = ".scores"  # ends the name of the scores of an Attention that was replaced
BLOCKED = -65504.0  # the score of a token that is masked: exp makes it 0, in float16 too


def lower(model: ir.Model, opset: int = 18) -> None:
    """Rewrite a graph from export, or its half, for an older opset, in place.

    Scores are computed in the type of the graph, q scaled before the product, so that float16 holds them where the
    product alone would overflow; a value NAME + SCORES has the scores that Attention kept inside.

    Args:
        model: the graph, with the shapes that export wrote.
        opset: 18 to 23; the graph's own opset or a newer one changes nothing.

    Raises:
        ExportError: the graph has an Attention with what export never writes (a cache, a soft cap, grouped heads).
    """
    if opset >= model.opset_imports[""]:
        return
    common.ShapeInferencePass(data_prop=False)(model)
    for node in list(model.graph):
        if node.op_type == "Attention" and opset < ATTENTION_SINCE:
            replace(model.graph, node, _attention)
        elif node.op_type == "Gelu" and opset < GELU_SINCE:
            replace(model.graph, node, _gelu)
        for name, same in YOUNGER.get(node.op_type, {}).items():
            if name in node.attributes:
                _need(node, node.attributes.pop(name).value in (same, same.encode() if isinstance(same, str) else same))
    common.RemoveUnusedNodesPass()(model)
    model.opset_imports[""] = opset
    model.ir_version = min(model.ir_version, IR_VERSION)


class Builder:
    """Puts nodes in front of the one that they replace, and names them after it."""

    def __init__(self, graph: ir.Graph, node: ir.Node) -> None:
        self._graph, self._node = graph, node
        self.dtype: ir.DataType = node.inputs[0].dtype
        self.prefix = str(node.outputs[0].name)

    def __call__(
        self, op: str, *inputs: ir.Value, name: str = "", dtype: ir.DataType | None = None, **options: Any
    ) -> ir.Value:
        name = f"{self.prefix}.{name or op}"
        node = ir.node(op, inputs, attributes=options, name=name)
        self._graph.insert_before(self._node, node)
        result: ir.Value = node.outputs[0]
        result.name, result.dtype = name, dtype or self.dtype
        return result

    def number(self, value: float) -> ir.Value:
        """Return a scalar of the node's type."""
        return self.constant(f"{value:g}.{self.dtype.numpy().name}", np.array(value, self.dtype.numpy()))

    def whole(self, *values: int) -> ir.Value:
        """Return a vector of whole numbers, such as a Reshape's target."""
        return self.constant("to_" + "_".join(map(str, values)), np.array(values, np.int64))

    def constant(self, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
        """Return the graph's initializer of that name; make it if missing."""
        initializers = self._graph.initializers
        if name not in initializers:
            tensor = ir.tensor(array, name=name)
            value = ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
            self._graph.register_initializer(value)
        return initializers[name]


def replace(graph: ir.Graph, node: ir.Node, make: Callable[[ir.Node, Builder], ir.Value]) -> None:
    """Put what `make` builds in the place of a node, under the name of its first output."""
    old, new = node.outputs[0], make(node, Builder(graph, node))
    name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
    new.name = name


def _gelu(node: ir.Node, build: Builder) -> ir.Value:
    """Build x · Φ(x), or its approximation by tanh."""
    x, half, one = node.inputs[0], build.number(0.5), build.number(1.0)
    if _text(node, "approximate", "none") == "tanh":
        cubic = build("Mul", build("Mul", x, x, name="square"), build.number(0.044715), name="cubic")
        inner = build("Mul", x, build("Add", cubic, one, name="series"), name="inner")
        curve = build("Tanh", build("Mul", inner, build.number(math.sqrt(2 / math.pi)), name="argument"))
    else:
        curve = build("Erf", build("Mul", x, build.number(math.sqrt(0.5)), name="argument"))
    phi = build("Mul", build("Add", curve, one, name="sum"), half, name="phi")
    return build("Mul", x, phi, name="product")


def _attention(node: ir.Node, build: Builder) -> ir.Value:
    """Build softmax(scale · q kᵀ + mask) v for each head; three axes are split into heads first and merged after."""
    check_attention(node)
    q, k, v = node.inputs[:3]
    flat = len(q.shape) == 3
    if flat:
        split = build.whole(0, 0, _heads(node), -1)
        q, k, v = (build("Reshape", x, split, name=f"split_{which}") for x, which in zip((q, k, v), "qkv", strict=True))
    swap = [0, 2, 1, 3]
    q, v = (build("Transpose", x, perm=swap, name=f"{which}") if flat else x for x, which in ((q, "q"), (v, "v")))
    k = build("Transpose", k, perm=[0, 2, 3, 1] if flat else [0, 1, 3, 2], name="k")
    scale = build.number(number(node, "scale", 0.0) or 1 / math.sqrt(_head_size(node)))
    scores = build("MatMul", build("Mul", q, scale, name="scaled"), k, name=SCORES[1:])
    weights = _softmax(node, _masked(node, scores, build), build)
    result = build("MatMul", weights, v, name="heads")
    if not flat:
        return result
    merged = build("Transpose", result, perm=swap, name="merged")
    return build("Reshape", merged, build.whole(0, 0, -1), name="result")


def _softmax(node: ir.Node, scores: ir.Value, build: Builder) -> ir.Value:
    wanted = number(node, "softmax_precision", 0)
    if not wanted or wanted == build.dtype:
        return build("Softmax", scores, axis=-1)
    precise = ir.DataType(int(wanted))
    scores = build("Cast", scores, to=precise, name="precise", dtype=precise)
    return build("Cast", build("Softmax", scores, axis=-1, dtype=precise), to=build.dtype, name="weights")


def _masked(node: ir.Node, scores: ir.Value, build: Builder) -> ir.Value:
    """Return scores with those of masked tokens lowered; a mask of booleans keeps tokens, one of numbers is added."""
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is not None:
        if mask.dtype == ir.DataType.BOOL:
            scores = build("Where", mask, scores, build.number(BLOCKED), name="masked")
        else:
            scores = build("Add", scores, mask, name="masked")
    if number(node, "is_causal", 0):
        integer, boolean = ir.DataType.INT64, ir.DataType.BOOL
        sides = build("Shape", scores, start=-2, name="sides", dtype=integer)
        ones = build("ConstantOfShape", sides, value=ir.tensor(np.array([1], np.int64)), name="ones", dtype=integer)
        seen = build("Trilu", ones, upper=0, name="triangle", dtype=integer)
        seen = build("Cast", seen, to=boolean, name="seen", dtype=boolean)
        scores = build("Where", seen, scores, build.number(BLOCKED), name="causal")
    return scores


def check_attention(node: ir.Node) -> None:
    """Refuse an Attention with what export never writes. Raise ExportError."""
    _need(node, not any(value is not None for value in node.inputs[4:]))
    _need(node, not any(value.uses() or value.is_graph_output() for value in node.outputs[1:]))
    _need(node, not number(node, "softcap", 0.0))
    heads = [number(node, name, 0) for name in ("q_num_heads", "kv_num_heads")]
    if not any(heads):
        heads = [value.shape[1] for value in node.inputs[:2]]
    _need(node, heads[0] == heads[1])


def _need(node: ir.Node, good: bool) -> None:
    if not good:
        raise ExportError(
            f"{node.op_type} {node.name!r} uses features that opset 18 lacks",
            needed="a graph that latentrt exported",
            fix="export the checkpoint again: latentrt export CHECKPOINT BUNDLE",
        )


def _heads(node: ir.Node) -> int:
    return int(node.attributes["q_num_heads"].as_int())


def _head_size(node: ir.Node) -> int:
    shape = node.inputs[0].shape
    return int(shape[-1]) // (_heads(node) if len(shape) == 3 else 1)


def number(node: ir.Node, name: str, default: float) -> float:
    """Return a node's attribute."""
    return node.attributes[name].value if name in node.attributes else default


def _text(node: ir.Node, name: str, default: str) -> str:
    return str(node.attributes[name].as_string()) if name in node.attributes else default
