"""A bundle's float32 graph as a strongly typed float16 graph, for GPUs.

Every float tensor becomes float16, but for islands of float32: the sinusoidal time embedding, numbers that float16
cannot hold, and the nodes that the caller names (`ranges.py` measures which would overflow). Casts stand at the
islands' borders only. Nothing here needs torch, so that a device can make the graph from an older bundle.

Norms stay in float16. ONNX Runtime's CUDA kernels and TensorRT's normalization layer read and write float16 but compute
mean and variance in float32, and LayerNormalization says so itself (`stash_type` 1). The one kernel that does not by
default, of SkipLayerNormalization, is told to (`latentrt.runtime.onnxruntime`). The norms' epsilons are attributes,
which are float32 always.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/accuracy-considerations.html
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import PurePosixPath

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
from numpy.typing import NDArray

HALF, SINGLE = ir.DataType.FLOAT16, ir.DataType.FLOAT
LARGEST = 65504.0  # float16's largest finite number
# Up to 999 and 4096, and no whole numbers above 2048 in float16; a sigma is squared.
TIME_INPUTS = ("timestep", "time_ids", "class_labels", "sigma")
SCALE = "scale"  # of a ControlNet in a row: rows are float32
LINEAR = ("Gemm", "MatMul")
CARRIERS = ("Add", "Max", "Sqrt", "Reciprocal", "Pow", "Log")  # their result may need float32 as their input does
# Inputs whose type the operator's specification fixes to float32.
FIXED = {"Resize": (1, 2)}


def half_path(path: str) -> str:
    """Return the path of the half graph of the graph at `path`: unet/model.onnx, unet/model.fp16.onnx."""
    return str(PurePosixPath(path).with_suffix(".fp16.onnx"))


def to_half(model: ir.Model, islands: Collection[str] = (), exact: Collection[str] = ()) -> None:
    """Turn a bundle's float32 graph into the float16 graph, in place.

    Inputs and outputs are float16 too, save for the two that hold times and sizes. Weights are read where they were:
    those stored in float16 without a Cast, others through a Cast to float16.

    Args:
        model: a graph as export writes it, read with `onnx_ir.load`.
        islands: names of nodes, or of their outputs, that stay in float32.
        exact: names of inputs and outputs that stay float32 too.
    """
    common.ShapeInferencePass(data_prop=False)(model)
    graph = model.graph
    constant = constants(graph)
    single = timing(graph) | _not_for_half(graph, constant)
    single |= {n for n in graph if n.name in islands or any(value.name in islands for value in n.outputs)}
    _follow_consumers(graph, constants(graph, shapes=True), single)
    for value in graph.inputs:
        if value.dtype == SINGLE and value.name not in (*TIME_INPUTS, SCALE, *exact):
            value.dtype = HALF
    retyped = _Retyped(graph)
    for node in list(graph):
        if not _is_weight_cast(node):
            _retype(node, SINGLE if node in single else HALF, retyped)
    for index, value in enumerate(graph.outputs):
        if value.dtype == SINGLE and value.name not in exact:
            graph.outputs[index] = _under_its_name(value, retyped(value, HALF, None))
    common.RemoveUnusedNodesPass()(model)


def emulate(model: ir.Model) -> None:
    """Make a half graph round to float16 wherever it says so, on a CPU: in place, same inputs and outputs.

    ONNX Runtime has few float16 kernels for CPUs: it computes in float32 and drops the rounding between such nodes, so
    that what overflows on a GPU does not there. Casts that stand in the graph are kept. Within a node numbers are
    float32, as a GPU accumulates.
    """
    graph = model.graph
    common.ShapeInferencePass(data_prop=False)(model)
    widened: dict[ir.Value, ir.Value] = {}

    def widen(node: ir.Node, value: ir.Value) -> ir.Value:
        if value not in widened:
            widened[value] = _cast(graph, value, SINGLE, f"{value.name}.wide", node)
        return widened[value]

    for node in list(graph):
        rounded = [value for value in node.outputs if value.dtype == HALF]
        if node.op_type == "Cast" or not rounded:
            continue
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == HALF:
                node.replace_input_with(index, widen(node, value))
        for value in rounded:
            _round_after(graph, node, value)


def _round_after(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let a node write float32, and a Cast behind it the previous float16 value."""
    value.dtype = SINGLE
    cast = ir.node("Cast", [value], attributes={"to": HALF}, name=f"{value.name}.round")
    rounded = cast.outputs[0]
    rounded.shape, rounded.dtype, rounded.name = value.shape, HALF, f"{value.name}.rounded"
    ir.convenience.replace_all_uses_with(value, rounded, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    graph.insert_after(node, cast)
    if rounded.is_graph_output():
        rounded.name, value.name = value.name, f"{value.name}.exact"


# --- which nodes stay in float32 --------------------------------------------------------------------------------------


def timing(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes between the times and sizes and the first linear layer: sinusoids of numbers up to thousands."""
    still = constants(graph, shapes=True)  # UNet2DModel multiplies the timestep by ones of the batch's size
    exact = {value for value in graph.inputs if value.name in TIME_INPUTS}
    nodes = set()
    for node in graph:
        moving = [v for v in node.inputs if v is not None and v not in still and v.dtype == SINGLE]
        if moving and node.op_type not in LINEAR and all(value in exact for value in moving):
            nodes.add(node)
            exact.update(node.outputs)
    return nodes


def _not_for_half(graph: ir.Graph, constant: Collection[ir.Value]) -> set[ir.Node]:
    """Return nodes that read a number that float16 cannot hold, or cast whole numbers, inexact above 2048, to floats.

    A tiny number is added before a root and a division: these are float32 with it.
    """
    unsafe = {value for value in graph.initializers.values() if not _fits(value)}
    nodes = set()
    for node in graph:
        if any(value in unsafe for value in node.inputs):
            if node.op_type in CARRIERS or all(value in constant for value in node.outputs):  # a Transpose of a weight
                unsafe.update(node.outputs)
            nodes.add(node)
        if node.op_type == "Cast" and node.outputs[0].dtype == SINGLE and not _is_float(node.inputs[0]):
            nodes.add(node)
    return nodes


def _fits(value: ir.Value) -> bool:
    """Return whether float16 can hold a constant: nothing finite overflows and, save in weights, nothing becomes 0."""
    tensor = value.const_value
    if tensor is None or tensor.dtype not in (SINGLE, ir.DataType.BFLOAT16) or tensor.size == 0:
        return True
    array: NDArray[np.float32] = tensor.numpy()
    if isinstance(tensor, ir.ExternalTensor):
        return max(float(array.max()), -float(array.min())) <= LARGEST
    finite = array[np.isfinite(array) & (array != 0)]
    with np.errstate(over="ignore", under="ignore"):
        half = finite.astype(np.float16)
    return bool(np.isfinite(half).all() and half.all())


def _follow_consumers(graph: ir.Graph, constant: Collection[ir.Value], single: set[ir.Node]) -> None:
    """Keep what only prepares weights (Transpose) in the precision of its readers: an island's are not rounded."""
    for node in reversed(graph):
        if node.outputs and all(value in constant and value.dtype == SINGLE for value in node.outputs):
            readers = [reader for value in node.outputs for reader in value.consumers()]
            if any(reader in single for reader in readers):
                single.add(node)


def constants(graph: ir.Graph, *, shapes: bool = False) -> set[ir.Value]:
    """Return initializers and what is computed from them alone; with `shapes`, from them and from shapes."""
    constant = set(graph.initializers.values())
    for node in graph:
        computed = node.inputs and all(value is None or value in constant for value in node.inputs)
        if computed or (shapes and node.op_type == "Shape"):
            constant.update(node.outputs)
    return constant


# --- retyping ---------------------------------------------------------------------------------------------------------


class _Retyped:
    """Values in another type, each made once: by a Cast before its first reader, or, for weights, at the source."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def __call__(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            self._made[value, dtype] = self._make(value, dtype, reader)
        return self._made[value, dtype]

    def _make(self, value: ir.Value, dtype: ir.DataType, reader: ir.Node | None) -> ir.Value:
        producer = value.producer()
        if dtype == HALF and producer is not None and _is_weight_cast(producer):
            return self(producer.inputs[0], dtype, reader)
        name = f"{value.name}.{dtype.numpy().name}"
        tensor = value.const_value
        if value.is_initializer() and tensor is not None and not isinstance(tensor, ir.ExternalTensor):
            narrow = ir.tensor(tensor.numpy().astype(dtype.numpy()), name=name)
            made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(dtype), const_value=narrow)
            self._graph.register_initializer(made)
            return made
        return _cast(self._graph, value, dtype, name, reader)


def _retype(node: ir.Node, dtype: ir.DataType, retyped: Callable[..., ir.Value]) -> None:
    """Let a node compute in `dtype`."""
    for index, value in enumerate(node.inputs):
        if value is None or index in FIXED.get(node.op_type, ()) or not _is_computed(value):
            continue
        if node.op_type != "Cast":  # a Cast reads anything
            node.replace_input_with(index, retyped(value, dtype, node))
    for value in node.outputs:
        if value.dtype == SINGLE:
            value.dtype = dtype
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(dtype))


def _cast(graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str, reader: ir.Node | None) -> ir.Value:
    """Return a Cast of a value, before `reader` or at the end."""
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    result: ir.Value = node.outputs[0]
    result.name, result.shape, result.dtype = name, value.shape, dtype
    if reader is None:
        graph.append(node)
    else:
        graph.insert_before(reader, node)
    return result


def _under_its_name(old: ir.Value, new: ir.Value) -> ir.Value:
    """Give an output's name to the value that takes its place."""
    name, old.name = old.name, f"{old.name}.float32"
    new.name = name
    return new


def _is_weight_cast(node: ir.Node) -> bool:
    """Return whether a node only widens a stored weight."""
    weight = node.inputs[0] if node.op_type == "Cast" else None
    return weight is not None and weight.is_initializer() and _is_float(weight)


def _is_computed(value: ir.Value) -> bool:
    return value.dtype in (SINGLE, HALF)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in (SINGLE, HALF, ir.DataType.BFLOAT16)
