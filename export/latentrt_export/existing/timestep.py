"""Give every lane of a denoiser its own timestep, where the graph takes one for the whole batch, or whole numbers.

Exporters record what diffusers does with a timestep: a number becomes a vector, is expanded to the batch, gets an axis
and is cast to float32, times the frequencies of the sinusoids. All of these but the last axis only repeat the number:
a vector with one number for each lane, float32 from the start, takes their place.
"""

from __future__ import annotations

import onnx_ir as ir

from latentrt.errors import ExportError

REPEATING = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Tile", "Unsqueeze")
FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


def per_lane(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let what reads a timestep read one for each lane, in place.

    Args:
        graph: of the denoiser, float32.
        old: its input: a number or a vector, of any type.
        new: takes its place; float32 (batch,).

    Raises:
        ExportError: something else than sinusoids of the whole batch reads it.
    """
    rank = len(old.shape) if old.shape is not None else 0
    if rank > 1:
        raise _refused(old, f"of {rank} axes")
    waiting = [(old, rank)]
    while waiting:
        value, rank = waiting.pop()
        for node, index in list(value.uses()):
            if node.op_type not in REPEATING or index != 0:
                if rank == 0 or (value.dtype not in FLOATS and node.op_type != "Shape"):
                    raise _refused(old, f"that {node.op_type} reads as one number")
                node.replace_input_with(index, new)
                continue
            own = _rank_after(node, rank)
            if own == 2:
                _with_an_axis(graph, node, new)
            elif own is None:
                raise _refused(old, f"that {node.op_type} brings into an unknown form")
            else:
                waiting.append((node.outputs[0], own))


def _rank_after(node: ir.Node, rank: int) -> int | None:
    """Return how many axes a node's output has; None where that is not known or the axis of the lanes is not first."""
    if node.op_type in ("Cast", "Identity", "Tile"):
        return rank
    if node.op_type == "Flatten":
        return None
    given = node.inputs[1] if len(node.inputs) > 1 else None
    numbers = _numbers(given)
    if node.op_type == "Unsqueeze":
        if numbers is None or len(numbers) != 1:
            return None
        return rank + 1 if rank == 0 or numbers[0] in (1, -1) else None
    if node.op_type == "Squeeze":
        return None
    if node.op_type == "Reshape" and numbers is not None:
        return len(numbers) if len(numbers) < 2 or numbers[1:] == [1] else None
    count = given.shape[0] if given is not None and given.shape is not None and len(given.shape) == 1 else None
    if isinstance(count, int):
        return count if count < 2 else None
    return max(rank, 1) if node.op_type == "Expand" else None  # to the batch: what else would be known by its shape


def _numbers(value: ir.Value | None) -> list[int] | None:
    tensor = value.const_value if value is not None else None
    return None if tensor is None else [int(n) for n in tensor.numpy().reshape(-1)]


def _with_an_axis(graph: ir.Graph, node: ir.Node, new: ir.Value) -> None:
    """Put (batch, 1) of `new` in the place of what a node makes of the timestep."""
    column, old = ir.node("Unsqueeze", [new, _axis(graph)], name="timestep.column"), node.outputs[0]
    result = column.outputs[0]
    result.name, result.dtype = f"{old.name}.by_lane", ir.DataType.FLOAT
    graph.insert_before(node, column)
    for reader, index in list(old.uses()):
        if reader.op_type != "Cast" and old.dtype not in FLOATS:
            raise _refused(old, f"that {reader.op_type} reads as whole numbers")
        reader.replace_input_with(index, result)


def _axis(graph: ir.Graph) -> ir.Value:
    name = "timestep.axis"
    if name not in graph.initializers:
        tensor = ir.tensor([1], dtype=ir.DataType.INT64, name=name)
        value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(value)
    return graph.initializers[name]


def _refused(value: ir.Value, why: str) -> ExportError:
    return ExportError(
        f"unet/model.onnx has a timestep ({value.name}) {why}",
        needed="a graph that can take one timestep for each picture of a batch",
        fix="export the checkpoint itself: latentrt export CHECKPOINT BUNDLE",
    )
