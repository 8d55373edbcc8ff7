"""A float32 graph for ONNX Runtime's CPU provider: self-attention without the whole matrix of scores.

Opset 23's Attention keeps the scores of all tokens: a gigabyte for Stable Diffusion 1.5 at 512 x 512 pixels. ONNX
Runtime's MultiHeadAttention computes them in blocks that stay in the cache (docs/speed.md has figures). The float32
graph itself stays free of ONNX Runtime's own operators: half graphs are made from it, and other runtimes read it.
"""

from __future__ import annotations

from pathlib import PurePosixPath

import onnx_ir as ir

from latentrt_export.graphs.cuda_graph import fuse, is_plain


def cpu_path(path: str) -> str:
    """Return the path of the CPU graph of the graph at `path`: unet/model.onnx, unet/model.cpu.onnx."""
    return str(PurePosixPath(path).with_suffix(".cpu.onnx"))


def for_cpu(model: ir.Model) -> int:
    """Turn a float32 graph into the graph for ONNX Runtime's CPU provider, in place; return how many nodes changed.

    Raises:
        ExportError: the graph has an Attention with what export never writes (see `latentrt_export.graphs.lower`).
    """
    nodes = [n for n in model.graph if n.op_type == "Attention" and is_plain(n) and _is_of_itself(n)]
    for node in nodes:
        fuse(model, node)
    return len(nodes)


def _is_of_itself(node: ir.Node) -> bool:
    """Return whether keys are as many as queries, and both grow with the picture."""
    queries, keys = (node.inputs[i].shape[1] for i in (0, 1))
    return isinstance(queries, ir.SymbolicDim) and queries.value is not None and queries == keys
