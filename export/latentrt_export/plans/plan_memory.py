"""Estimate what building and running a plan will take, from its graph, before anything is built.

Weights are counted exactly. Activations are the largest sum of tensors that are alive at once when the nodes run in
the graph's order at the largest shapes; TensorRT fuses some away and keeps scratch for others. The host's peak is a
line through measurements. docs/tensorrt.md has estimates beside measurements.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from latentrt.errors import DeviceMemoryError, PlanError
from latentrt.runtime.tensorrt.record import STRIPPED, PlanKey, Profile, Weight

SCRATCH = 2**23  # bytes that every plan takes for its kernels
CODE = 25_000  # bytes of kernels in a plan for each node of the graph
LEAST_CODE = 2_000_000  # of any plan with products of matrices: 1.9 to 2.7 MB for the 14 of a text's keys and values
HOST_BASE = 300_000_000  # bytes of host memory: the library, and the process that it works in
HOST_PER_NODE = 400_000  # for compiling
HOST_PER_WEIGHT = 3  # times the weights: parsed, cloned, serialized
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "BOOL": 1}
FUSED = range(16, 257, 8)  # sizes of a head, in float16, for which there are fused kernels
SHARES_MEMORY = ("5.3", "6.2", "7.2", "8.7", "10.1", "11.0", "12.1")  # Jetson boards, Thor, Spark
VIEWS = ("Reshape", "Squeeze", "Unsqueeze", "Identity", "Shape", "Cast")  # no memory of their own once fused


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that a network takes; `seconds` is the time of its last build, if there was one.

    `device` is what the GPU must have free: weights, activations and the workspace in which tactics are tried.
    """

    network: str
    weights: int
    activations: int
    plan: int
    device: int
    host: int
    seconds: float | None = None


def estimate(key: PlanKey, model: onnx.ModelProto, weights: Iterable[Weight], seconds: float | None = None) -> Estimate:
    """Estimate a plan.

    Args:
        model: the graph that the parser gets; its weights are not read.
        weights: the weights that lie in safetensors.
        seconds: what building it took last time.
    """
    held = sum(weight.bytes * np.dtype(weight.dtype).itemsize // SIZES[weight.stored] for weight in weights)
    nodes = len(model.graph.node)
    activations = SCRATCH + max(peak_activations(model, profile) for profile in key.profiles)
    return Estimate(
        key.network,
        held,
        activations,
        plan=max(CODE * nodes, LEAST_CODE) + (0 if STRIPPED in key.options else held),
        device=held + 2 * activations,  # tactics are tried on tensors of their own
        host=HOST_BASE + HOST_PER_NODE * nodes + HOST_PER_WEIGHT * held,
        seconds=seconds,
    )


def check_room(
    estimates: Sequence[Estimate], folder: Path, device_free: int | None, compute_capability: str = ""
) -> None:
    """Refuse what will not fit, before it is begun. Memory must hold one network at a time, the disk all plans.

    Args:
        folder: where the plans will lie.
        device_free: bytes of the GPU that are free; None where no GPU is in this machine.
        compute_capability: of the GPU, as "8.7"; some share the host's memory.

    Raises:
        DeviceMemoryError: the GPU, or this machine, has too little memory free for a network.
        PlanError: the disk has too little room.
    """
    plans, room = sum(each.plan for each in estimates), shutil.disk_usage(folder).free
    if room < plans:
        raise PlanError(
            f"{folder} has {room / 1e6:.0f} MB free",
            needed=f"about {plans / 1e6:.0f} MB for plans",
            fix="make room, or pass --plans",
        )
    for each in estimates:
        on_device = each.device + (each.host if compute_capability in SHARES_MEMORY else 0)
        for what, needed, free in (("the GPU", on_device, device_free), ("this machine", each.host, host_free())):
            if free is not None and free < needed:
                raise DeviceMemoryError(
                    f"{what} has {free / 2**30:.1f} GiB free",
                    needed=f"about {needed / 2**30:.1f} GiB to build the {each.network} "
                    f"(weights {each.weights / 2**30:.2f}, activations {each.activations / 2**30:.2f})",
                    fix="end other programs, take fewer lanes or a smaller size, or pass --ignore-estimate",
                )


def host_free() -> int | None:
    """Return the bytes of host memory that programs can still have (Linux's MemAvailable); None if unknown."""
    return _of_system("meminfo", "MemAvailable")


def peak_here() -> int | None:
    """Return the most bytes of host memory that this process has had (Linux's VmHWM); None if unknown."""
    return _of_system("self/status", "VmHWM")  # getrusage would count the process that started this one, too


def _of_system(file: str, name: str) -> int | None:
    try:
        lines = Path("/proc", file).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A value's shape and the bytes of one of its items."""

    shape: tuple[int, ...]
    itemsize: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def peak_activations(model: onnx.ModelProto, profile: Profile) -> int:
    """Return the largest sum of bytes of tensors that are alive at once, at a profile's largest shapes."""
    tensors = _tensors(model, profile)
    graph = model.graph
    sizes = _sizes(graph, tensors)
    last = {name: index for index, node in enumerate(graph.node) for name in node.input}
    last |= {value.name: len(graph.node) for value in graph.output}
    alive = sum(sizes.get(value.name, 0) for value in graph.input)
    peak, ends = alive, dict[int, list[str]]()
    for index, node in enumerate(graph.node):
        for name in node.output:
            alive += sizes.get(name, 0)
            ends.setdefault(last.get(name, index), []).append(name)
        peak = max(peak, alive + _scores(node, tensors))
        alive -= sum(sizes.get(name, 0) for name in ends.pop(index, ()))
    return peak


def _sizes(graph: onnx.GraphProto, tensors: Mapping[str, _Tensor]) -> dict[str, int]:
    """Return the bytes of every input and every node's output. One whose shape cannot be inferred counts as large as
    what is computed from it.
    """
    sizes = {name: tensor.bytes for name, tensor in tensors.items()}
    for node in reversed(graph.node):
        made = max((sizes.get(name, 0) for name in node.output), default=0)
        for name in node.input:
            sizes.setdefault(name, made)
    for node in graph.node:
        if node.op_type in VIEWS:
            sizes.update(dict.fromkeys(node.output, 0))
    return sizes | {tensor.name: 0 for tensor in graph.initializer}


def _scores(node: onnx.NodeProto, tensors: Mapping[str, _Tensor]) -> int:
    """Return the bytes of an attention's scores, before and after Softmax; 0 where a fused kernel keeps them out of
    memory.
    """
    if node.op_type != "Attention" or not {node.input[0], node.input[1]} <= set(tensors):
        return 0
    query, key = tensors[node.input[0]], tensors[node.input[1]]
    named = {attribute.name: attribute.i for attribute in node.attribute}
    heads = named.get("q_num_heads") or query.shape[1]
    size = query.shape[-1] // (heads if len(query.shape) == 3 else 1)
    if query.itemsize == 2 and size in FUSED:
        return 0
    return 2 * query.shape[0] * heads * query.shape[-2] * key.shape[-2] * query.itemsize


def _tensors(model: onnx.ModelProto, profile: Profile) -> dict[str, _Tensor]:
    """Return every input and output of a node whose shape can be inferred, at the profile's largest sizes."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        for side in value.type.tensor_type.shape.dim:
            if side.dim_param:
                side.dim_value = profile.side(side.dim_param)[2]
    for value in sized.graph.output:
        for side in value.type.tensor_type.shape.dim:
            side.Clear()
    del sized.graph.value_info[:]
    graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
    values = [*graph.value_info, *graph.input, *graph.output]
    return {value.name: tensor for value in values if (tensor := _tensor(value)) is not None}


def _tensor(value: onnx.ValueInfoProto) -> _Tensor | None:
    kind = value.type.tensor_type
    if not kind.HasField("shape") or any(not side.HasField("dim_value") for side in kind.shape.dim):
        return None
    return _Tensor(tuple(side.dim_value for side in kind.shape.dim), int(ir.DataType(kind.elem_type).itemsize))
