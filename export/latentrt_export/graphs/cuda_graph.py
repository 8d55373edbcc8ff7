"""A half graph as ONNX Runtime's CUDA provider runs it best: only arithmetic on shapes is left to the CPU.

A provider has kernels for certain versions of an operator. CUDA's has InstanceNormalization 6, which opset 22 made 22:
in a graph of that opset or a later one every norm runs on the CPU, between two copies, and a stream with such
copies cannot be captured as a CUDA graph. `tests/support/gpu/cuda_kernels.py` lists the versions that are registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path, PurePosixPath

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import FP16, FP16_ORT_CUDA, ModelSpec, Variant
from latentrt_export.graphs.fused import PASSES, Pass, run_passes
from latentrt_export.graphs.lower import Builder, check_attention, lower, number, replace

OPSET = 21  # the last one with InstanceNormalization 6
CONTRIB = "com.microsoft"  # ONNX Runtime's own operators
WHOLE = (ir.DataType.INT32, ir.DataType.INT64)


def cuda_path(path: str) -> str:
    """Return the path of the CUDA graph of the graph at `path`: unet/model.onnx, unet/model.cuda.onnx."""
    return str(PurePosixPath(path).with_suffix(".cuda.onnx"))


def for_cuda(model: ir.Model, passes: Sequence[Pass] = PASSES) -> dict[str, int]:
    """Turn a half graph into the graph for ONNX Runtime's CUDA provider, in place; types stay as they are.

    Opset 21 has no Attention. Where nothing is masked, MultiHeadAttention takes its place, with the same fused kernels
    (https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MultiHeadAttention). A
    masked one, of a text encoder's 77 tokens, becomes MatMul, Softmax, MatMul.

    Args:
        model: a half graph of a bundle, read with `onnx_ir.load`; a float32 one is rewritten alike.
        passes: of `latentrt_export.graphs.fused`; () for the plain graph, with MultiHeadAttention alone.

    Returns:
        How many places each pass changed, by its name.

    Raises:
        ExportError: the graph has an Attention with what export never writes (see `latentrt_export.graphs.lower`).
    """
    for node in list(model.graph):
        if node.op_type == "Attention" and is_plain(node):
            to_multi_head(model, node)
        elif node.op_type == "ArgMax" and _is_of_tokens(node):
            replace(model.graph, node, _first_of_largest)
    lower(model, OPSET)
    return run_passes(model, passes)


def cuda_variants(root: Path, spec: ModelSpec, name: str = "plain", passes: Sequence[Pass] = ()) -> ModelSpec:
    """Write another CUDA graph of every network beside the bundle's own, for a comparison: unet/model.cuda-plain.onnx.

    The bundle on disk stays as it is. `Bundle(root, cuda_variants(root, spec), {})` runs these graphs.

    Args:
        root: the folder of the bundle.
        spec: of the bundle; it needs half graphs.
        name: part of the files' names.
        passes: to run on the graphs; by default none.

    Returns:
        The spec with these graphs in the place of the bundle's CUDA graphs.
    """
    networks = {}
    for network, known in spec.networks.items():
        model = ir.load(root / known.variants[FP16].path)
        for_cuda(model, passes)
        path = str(PurePosixPath(known.variants[FP16].path.replace(".fp16", "")).with_suffix(f".cuda-{name}.onnx"))
        ir.save(model, root / path)
        own = Variant(path, OPSET, len(model.graph), known.variants[FP16].dtypes)
        networks[network] = changed(known, variants={**known.variants, FP16_ORT_CUDA: own})
    return changed(spec, networks=networks)


def is_plain(node: ir.Node) -> bool:
    """Return whether MultiHeadAttention can replace it: three axes, no mask, the kernels' own softmax."""
    check_attention(node)
    masked = any(value is not None for value in node.inputs[3:]) or number(node, "is_causal", 0)
    return not masked and not number(node, "softmax_precision", 0) and len(node.inputs[0].shape) == 3


def to_multi_head(model: ir.Model, node: ir.Node) -> None:
    """Put MultiHeadAttention in the place of an Attention that `is_plain`."""
    attributes: dict[str, int | float] = {"num_heads": node.attributes["q_num_heads"].as_int()}
    if scale := number(node, "scale", 0.0):
        attributes["scale"] = scale
    fused = ir.node("MultiHeadAttention", node.inputs[:3], attributes, domain=CONTRIB, name=node.name)
    model.opset_imports[CONTRIB] = 1
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [fused], node.outputs[:1], fused.outputs)


def _is_of_tokens(node: ir.Node) -> bool:
    """Return whether an ArgMax finds the first of the largest whole numbers along the last axis, of known length."""
    numbers = node.inputs[0]
    first = not number(node, "select_last_index", 0) and number(node, "axis", 0) in (-1, len(numbers.shape) - 1)
    return first and numbers.dtype in WHOLE and isinstance(numbers.shape[-1], int)


def _first_of_largest(node: ir.Node, build: Builder) -> ir.Value:
    """Build ArgMax of whole numbers, which CUDA has no kernel for: the smallest index of the largest number.

    With it a text encoder with pooled embeddings (SDXL's second) finds the end of the prompt.
    """
    numbers, axes, integer = node.inputs[0], build.whole(-1), ir.DataType.INT64
    size = int(numbers.shape[-1])
    largest = build("ReduceMax", numbers, axes, keepdims=1, name="largest")
    found = build("Equal", numbers, largest, name="found", dtype=ir.DataType.BOOL)
    places = build.constant(f"up_to_{size}", np.arange(size, dtype=np.int64))
    beyond = build.constant(f"beyond_{size}", np.array(size, np.int64))
    places = build("Where", found, places, beyond, name="places", dtype=integer)
    keep = int(number(node, "keepdims", 1))
    return build("ReduceMin", places, axes, keepdims=keep, name="first", dtype=integer)
