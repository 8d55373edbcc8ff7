"""Residuals of ControlNets: inputs of a UNet's graph, and the chain of a ControlNet's own.

A UNet goes down, keeping what each layer gives (skips), and up again, where every layer joins what comes from below
with one of them: a Concat over channels. A ControlNet's residuals are added to the skips where they are joined, and to
what comes out of the middle, as diffusers adds them after the whole way down.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import RESIDUAL
from latentrt.model.control import BEFORE, FACTORS, SCALE
from latentrt_export.graphs.cpu_graph import value_of
from latentrt_export.graphs.passes import constant

MIDDLE = f"{RESIDUAL}mid"
SIDES = ("height", "width")
LARGE = 2**12  # a side that every level halves evenly


def control_path(path: str) -> str:
    """Return the path of the graph with residuals of the graph at `path`: unet/model.onnx, unet/model.control.onnx."""
    return f"{path.removesuffix('.onnx')}.control.onnx"


def residual_names(count: int) -> list[str]:
    """Return the names of so many residuals; the last is the middle's."""
    return [*(f"{RESIDUAL}{index}" for index in range(count - 1)), MIDDLE]


def read_residuals(model: ir.Model) -> tuple[ir.Value, ...]:
    """Let the graph of a denoiser add residuals, which become its last inputs, in place.

    Args:
        model: a graph of a UNet as export writes it, in float32 or float16.

    Returns:
        The new inputs, from the first layer's skip to the last one's, then the middle's; () if it is no such UNet.
    """
    joins = [node for node in model.graph if _joins(node)]
    if not joins:
        return ()
    places = [*((join, 1) for join in reversed(joins)), (joins[0], 0)]
    inputs = []
    for name, (join, index) in zip(residual_names(len(places)), places, strict=True):
        value = join.inputs[index]
        assert value is not None
        shape = ir.Shape([value.shape[0], value.shape[1], *sides_of(value)])
        given = ir.Value(name=name, shape=shape, type=ir.TensorType(value.dtype))
        node = ir.node("Add", [value, given], name=f"{name}.add")
        total = node.outputs[0]
        total.name, total.shape, total.dtype = f"{name}.total", value.shape, value.dtype
        model.graph.insert_before(join, node)
        join.replace_input_with(index, total)
        inputs.append(given)
    model.graph.inputs.extend(inputs)
    return tuple(inputs)


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
    graph = model.graph
    own = list(graph.outputs)
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
    for index, (value, part) in enumerate(zip(own, node.outputs, strict=True)):
        name, part.name = str(value.name), f"strength.{index}"
        part.dtype, value.name = value.dtype, f"{name}.own"
        shape = ir.Shape([batch, value.shape[1], *sides_of(value)])
        given = _input(graph, f"{name}{BEFORE}", tuple(shape))
        added = _append(graph, "Mul", [value, part], f"{name}.scaled")
        added = _append(graph, "ReduceMean", [added, sides], f"{name}.pooled") if sides is not None else added
        total = _append(graph, "Add", [given, added], name)
        total.shape = shape
        graph.outputs[index] = total


def sides_of(value: ir.Value) -> list[str]:
    """Return the height and width of a level of a UNet, by the latents' own: "((height+3)//4)".

    The tracer writes sizes in its own form, as ((height - 1)//2)//2 + 1. A level's are those above it, halved and
    rounded up.
    """
    sizes = []
    for name, size in zip(SIDES, list(value.shape)[2:], strict=True):
        formula = ast.parse(str(size.value if isinstance(size, ir.SymbolicDim) else size), mode="eval").body
        divisor = LARGE // value_of(formula, dict.fromkeys(SIDES, LARGE))
        sizes.append(name if divisor == 1 else f"(({name}+{divisor - 1})//{divisor})")
    return sizes


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
