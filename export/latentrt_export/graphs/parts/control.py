"""Residuals of ControlNets and T2I-Adapters: inputs of a UNet's graph, and the chain of an add-on's own.

A UNet goes down, keeping what each layer gives (skips), and up again, where every layer joins what comes from below
with one of them: a Concat over channels. A ControlNet's residuals are added to the skips where they are joined, and to
what comes out of the middle, as diffusers adds them after the whole way down. A T2I-Adapter's features are added on
that way, one for each block, and one to the middle: what comes after them reads the sum, and so does the skip.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import ADAPTER, HINT, RESIDUAL
from latentrt.model.control import BEFORE, FACTORS, SCALE
from latentrt_export.graphs.cpu_graph import value_of
from latentrt_export.graphs.passes import constant

MIDDLE = f"{RESIDUAL}mid"
SIDES = ("height", "width")
WITH_TEXT, WITHOUT_TEXT = "CrossAttnDownBlock2D", "DownBlock2D"  # blocks of the way down
LARGE = 2**12  # a side that every level halves evenly


def control_path(path: str, ending: str) -> str:
    """Return the path of the graph with residuals of the graph at `path`: unet/model.onnx, unet/model.control.onnx.

    `ending` is that of the variant: "+control" or "+adapter".
    """
    return f"{path.removesuffix('.onnx')}.{ending.removeprefix('+')}.onnx"


def residual_names(count: int) -> list[str]:
    """Return the names of so many residuals; the last is the middle's."""
    return [*(f"{RESIDUAL}{index}" for index in range(count - 1)), MIDDLE]


def hint_name(index: int) -> str:
    """Return the name of the features that a T2I-Adapter has for a block of a UNet."""
    return f"{HINT}_{index}"


def adapted_skips(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Return, for each block of a UNet's way down, which skip holds what a T2I-Adapter's features are added to.

    A block with attention adds them to the output of its last layer, others to what they give, as diffusers does. () of
    a UNet with other blocks.

    Args:
        config: of the UNet.
    """
    types, layers = config.get("down_block_types", ()), config.get("layers_per_block", 2)
    if not types or not set(types) <= {WITH_TEXT, WITHOUT_TEXT}:
        return ()
    counts = layers if isinstance(layers, (list, tuple)) else [layers] * len(types)
    skips, first = list[int](), 1  # 0 is what the first convolution gives
    for index, (kind, count) in enumerate(zip(types, counts, strict=True)):
        halves = index < len(types) - 1
        skips.append(first + count - 1 + (halves and kind == WITHOUT_TEXT))
        first += count + halves
    return tuple(skips)


def read_residuals(model: ir.Model, adapted: Sequence[int] = ()) -> tuple[ir.Value, ...]:
    """Let the graph of a denoiser add residuals, which become its last inputs, in place.

    Args:
        model: a graph of a UNet as export writes it, in float32 or float16.
        adapted: of `adapted_skips`.

    Returns:
        The new inputs, from the first layer's skip to the last one's, then the middle's; then those of T2I-Adapters,
        from the first block's to the last one's and the middle's. () if it is no such UNet. Their sizes are written as
        the graph writes them, so that passes know which are the same; `name_sides` is for the end.
    """
    joins = [node for node in model.graph if _joins(node)]
    if not joins:
        return ()
    places = [*((join, 1) for join in reversed(joins)), (joins[0], 0)]
    features = [places[index] for index in (*adapted, -1)] if adapted else []
    adapters = [_add_everywhere(model.graph, f"{ADAPTER}{index}", *place) for index, place in enumerate(features)]
    inputs = []
    for name, (join, index) in zip(residual_names(len(places)), places, strict=True):
        value = join.inputs[index]
        assert value is not None
        given, node = _sum(name, value, value)
        model.graph.insert_before(join, node)
        join.replace_input_with(index, node.outputs[0])
        inputs.append(given)
    model.graph.inputs.extend((*inputs, *adapters))
    return (*inputs, *adapters)


def name_sides(inputs: Iterable[ir.Value]) -> None:
    """Write the sizes of inputs by the latents' own, in place."""
    for value in inputs:
        value.shape = ir.Shape([value.shape[0], value.shape[1], *sides_of(value)])


def _add_everywhere(graph: ir.Graph, name: str, join: ir.Node, index: int) -> ir.Value:
    """Add a new value to one that a join reads, for all that read it; return the new one, of the join's dtype."""
    read = value = join.inputs[index]
    assert read is not None
    while value.producer().op_type == "Cast":  # where an island of float32 ends
        value = value.producer().inputs[0]
    given, node = _sum(name, value, read)
    nodes, total = [node], node.outputs[0]
    if value.dtype != read.dtype:
        cast = ir.node("Cast", [given], {"to": value.dtype}, name=f"{name}.cast")
        cast.outputs[0].name, cast.outputs[0].shape, cast.outputs[0].dtype = f"{name}.cast", given.shape, value.dtype
        node.replace_input_with(1, cast.outputs[0])
        nodes = [cast, node]
    ir.convenience.replace_all_uses_with(value, total)
    node.replace_input_with(0, value)
    graph.insert_after(value.producer(), nodes)
    return given


def _sum(name: str, value: ir.Value, like: ir.Value) -> tuple[ir.Value, ir.Node]:
    """Return a new value of the shape and dtype of `like`, and the node that adds it to `value`."""
    given = ir.Value(name=name, shape=like.shape, type=ir.TensorType(like.dtype))
    node = ir.node("Add", [value, given], name=f"{name}.add")
    total = node.outputs[0]
    total.name, total.shape, total.dtype = f"{name}.total", value.shape, value.dtype
    return given, node


def _joins(node: ir.Node) -> bool:
    """Return whether a node joins two computed values of four axes over channels."""
    if node.op_type != "Concat" or len(node.inputs) != 2 or node.attributes["axis"].as_int() not in (1, -3):
        return False
    return all(
        v is not None and v.producer() is not None and v.shape is not None and len(v.shape) == 4 for v in node.inputs
    )


def add_chain(model: ir.Model, *, pools: bool = False) -> None:
    """Let the graph of a ControlNet scale its residuals and add them to given ones of the same names, in place.

    It reads "scale" (batch,), "factors" (batch, residuals), one for each, and the given residuals; what it gives is
    given + own * (scale * factor). With `pools`, its own are averaged over height and width first.
    """
    own = {str(value.name): value for value in model.graph.outputs}
    for name, value in own.items():
        value.name = f"{name}.own"
    model.graph.outputs.clear()
    _chain(model.graph, own, pools=pools)


def scaled_hints(model: ir.Model, factor: int) -> ir.Model:
    """Return the graph that rows call of a T2I-Adapter: as `add_chain` makes, of the features that its picture gave.

    Args:
        model: the graph that gives the features, of a picture.
        factor: pixels a side of each of the latents that the result's sizes are of.
    """
    own = dict[str, ir.Value]()
    for index, value in enumerate(model.graph.outputs):
        sides = [level(name, divisor // factor) for name, divisor in zip(SIDES, _divisors(value), strict=True)]
        shape = ir.Shape([value.shape[0], value.shape[1], *sides])
        own[f"{ADAPTER}{index}"] = ir.Value(name=value.name, shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
    imports = dict(model.opset_imports)
    graph = ir.Graph(list(own.values()), [], nodes=[], opset_imports=imports, name="scaled")
    _chain(graph, own)
    return ir.Model(graph, ir_version=model.ir_version)


def _chain(graph: ir.Graph, own: Mapping[str, ir.Value], *, pools: bool = False) -> None:
    """Add what `add_chain` says to a graph without outputs, of its own residuals by the names of the results."""
    batch = graph.inputs[0].shape[0]
    scale = _input(graph, SCALE, (batch,))
    factors = _input(graph, FACTORS, (batch, len(own)))
    column = constant(graph, "to_0_1", np.array([0, 1], np.int64))
    parts = constant(graph, "to_0_0_1_1", np.array([0, 0, 1, 1], np.int64))
    strength = _append(graph, "Mul", [_append(graph, "Reshape", [scale, column], "scale.column"), factors], "strength")
    node = ir.node(
        "Split",
        [_append(graph, "Reshape", [strength, parts], "strengths")],
        {"axis": 1, "num_outputs": len(own)},
        num_outputs=len(own),
        name="strength.split",
    )
    graph.append(node)
    sides = constant(graph, "sides", np.array([2, 3], np.int64)) if pools else None
    for index, ((name, value), part) in enumerate(zip(own.items(), node.outputs, strict=True)):
        part.name, part.dtype = f"strength.{index}", value.dtype
        shape = ir.Shape([batch, value.shape[1], *sides_of(value)])
        given = _input(graph, f"{name}{BEFORE}", tuple(shape))
        added = _append(graph, "Mul", [value, part], f"{name}.scaled")
        added = _append(graph, "ReduceMean", [added, sides], f"{name}.pooled") if sides is not None else added
        total = _append(graph, "Add", [given, added], name)
        total.shape = shape
        graph.outputs.append(total)


def sides_of(value: ir.Value) -> list[str]:
    """Return the height and width of a level of a UNet, by the latents' own: "((height+3)//4)".

    The tracer writes sizes in its own form, as ((height - 1)//2)//2 + 1. A level's are those above it, halved and
    rounded up.
    """
    return [level(name, divisor) for name, divisor in zip(SIDES, _divisors(value), strict=True)]


def level(name: str, divisor: int) -> str:
    """Return a side that is divided and rounded up."""
    return name if divisor == 1 else f"(({name}+{divisor - 1})//{divisor})"


def _divisors(value: ir.Value) -> list[int]:
    """Return what a value's sides are divided by, of the graph's own height and width."""
    found = []
    for size in list(value.shape)[2:]:
        formula = ast.parse(str(size.value if isinstance(size, ir.SymbolicDim) else size), mode="eval").body
        found.append(LARGE // value_of(formula, dict.fromkeys(SIDES, LARGE)))
    return found


def _input(graph: ir.Graph, name: str, shape: Sequence[int | str | ir.SymbolicDim]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _append(graph: ir.Graph, op: str, inputs: Sequence[ir.Value], name: str) -> ir.Value:
    node = ir.node(op, inputs, name=name)
    graph.append(node)
    result: ir.Value = node.outputs[0]
    result.name, result.dtype = name, ir.DataType.FLOAT
    return result
