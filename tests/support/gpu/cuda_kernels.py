"""The kernels of ONNX Runtime 1.31.1's CUDA provider: the operators of latentrt's CUDA graphs, opset 13 and later.

Read from the wheel of onnxruntime-gpu (cp311, manylinux), whose `get_all_opkernel_def()` lists what is registered;
docs/OperatorKernels.md of ONNX Runtime's repository shows the same. Types are only those in latentrt's graphs. The
operators of com.microsoft are in contrib_ops/cuda, in diffusion/ (BiasAdd, BiasSplitGelu, GroupNorm, NhwcConv,
SkipGroupNorm), bert/ (BiasGelu, MultiHeadAttention, SkipLayerNormalization) and activation/ (QuickGelu); each has one
version.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx import defs

FLOATS = "float16 float32"
NUMBERS = f"{FLOATS} int32 int64"
ALL = f"{NUMBERS} bool"

# Versions are "first-last", or "first+" for a kernel that is registered without an end.
KERNELS = {
    "Add": ("13-13 14+", NUMBERS),
    "And": ("7+", "bool"),
    "ArgMax": ("13+", FLOATS),
    "Attention": ("23-23 24+", FLOATS),
    "BiasAdd": ("1+", FLOATS),
    "BiasGelu": ("1+", FLOATS),
    "BiasSplitGelu": ("1+", FLOATS),
    "Cast": ("13-18 19-20 21-22 23-24 25+", ALL),
    "Concat": ("13+", ALL),
    "Conv": ("11-21 22+", FLOATS),
    "ConvTranspose": ("11+", FLOATS),
    "Cos": ("7-21 22+", FLOATS),
    "Div": ("13-13 14+", NUMBERS),
    "Equal": ("13-18 19+", ALL),
    "Expand": ("13+", ALL),
    "Gather": ("13+", ALL),
    "GatherND": ("13+", f"{FLOATS} int64 bool"),
    "Gelu": ("20+", FLOATS),
    "Gemm": ("13+", FLOATS),
    "GroupNorm": ("1+", FLOATS),
    "InstanceNormalization": ("6+", FLOATS),
    "LayerNormalization": ("1-16 17+", FLOATS),
    "Less": ("13+", NUMBERS),
    "Log": ("13+", FLOATS),
    "MatMul": ("13+", FLOATS),
    "Max": ("13+", NUMBERS),
    "Mul": ("13-13 14+", NUMBERS),
    "MultiHeadAttention": ("1+", FLOATS),
    "NhwcConv": ("1+", FLOATS),
    "Pad": ("13-17 18-18 19-20 21-22 23-23 24-24 25+", f"{FLOATS} bool"),
    "Pow": ("15+", NUMBERS),
    "QuickGelu": ("1+", FLOATS),
    "Range": ("11-26 27+", "float32 int32 int64"),
    "ReduceMax": ("1-17 18-19 20+", NUMBERS),
    "ReduceMin": ("1-17 18-19 20+", NUMBERS),
    "Relu": ("13-13 14+", FLOATS),
    "Reshape": ("13-13 14-18 19-20 21-22 23-24 25+", ALL),
    "Resize": ("13-17 18-18 19+", f"{FLOATS} int32"),
    "Shape": ("13-14 15-18 19-20 21-22 23-24 25+", ALL),
    "Sigmoid": ("13+", FLOATS),
    "Sin": ("7-21 22+", FLOATS),
    "SkipGroupNorm": ("1+", FLOATS),
    "SkipLayerNormalization": ("1+", FLOATS),
    "Slice": ("13+", ALL),
    "Softmax": ("13+", FLOATS),
    "Split": ("13-17 18+", ALL),
    "Squeeze": ("13-20 21-22 23-23 24-24 25+", ALL),
    "Transpose": ("13-20 21-22 23-24 25+", ALL),
    "Unsqueeze": ("13-20 21-22 23-23 24-24 25+", ALL),
    "Where": ("9-15 16+", NUMBERS),
}
TYPED_BY_INPUT = ("ArgMax", "Equal", "Less", "Shape")  # the others by their output


def without_kernel(model: ir.Model) -> set[str]:
    """Return the operators of a graph, with version and type, that the CUDA provider leaves to the CPU.

    Not those that it could run and leaves there by choice: arithmetic on shapes.
    """
    missing = set()
    for node in model.graph:
        versions, types = KERNELS.get(node.op_type, ("", ""))
        since = _since(node, model.opset_imports[node.domain])
        value = node.inputs[0] if node.op_type in TYPED_BY_INPUT else node.outputs[0]
        dtype = value.dtype.numpy().name if value is not None and value.dtype is not None else "unknown"
        if dtype not in types.split() or not any(_serves(kernel, since) for kernel in versions.split()):
            missing.add(f"{node.op_type} {since} {dtype}")
    return missing


def _since(node: ir.Node, opset: int) -> int:
    """Return the version of an operator that an opset has; ONNX Runtime's own ones have one version only."""
    return defs.get_schema(node.op_type, opset).since_version if node.domain == "" else opset


def _serves(kernel: str, since: int) -> bool:
    """Decide as ONNX Runtime's kernel_registry.cc: a kernel without an end serves only the version it starts with."""
    if kernel.endswith("+"):
        return since == int(kernel[:-1])
    first, last = map(int, kernel.split("-"))
    return first <= since <= last
