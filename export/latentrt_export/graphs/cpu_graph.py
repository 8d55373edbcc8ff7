"""A float32 graph for ONNX Runtime's CPU provider: self-attention without the whole matrix of scores.

Opset 23's Attention keeps the scores of all tokens: a gigabyte for Stable Diffusion 1.5 at 512 x 512 pixels. ONNX
Runtime's MultiHeadAttention computes them in blocks that stay in the cache (docs/speed.md has figures). The float32
graph itself stays free of ONNX Runtime's own operators: half graphs are made from it, and other runtimes read it.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Mapping
from pathlib import PurePosixPath

import onnx_ir as ir

from latentrt_export.graphs.cuda_graph import is_plain, to_multi_head

FEWEST_TOKENS = 512  # from which MultiHeadAttention is the faster one, for every size of head (docs/speed.md)
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv}


def cpu_path(path: str) -> str:
    """Return the path of the CPU graph of the graph at `path`: unet/model.onnx, unet/model.cpu.onnx."""
    return str(PurePosixPath(path).with_suffix(".cpu.onnx"))


def for_cpu(model: ir.Model, sizes: Mapping[str, int]) -> int:
    """Turn a float32 graph into the graph for ONNX Runtime's CPU provider, in place; return how many nodes changed.

    Args:
        model: a float32 graph of a bundle, read with `onnx_ir.load`.
        sizes: of its symbolic dimensions: the height and width that the model was made for. Where few tokens look at
            each other then, Attention stays.

    Raises:
        ExportError: the graph has an Attention with what export never writes (see `latentrt_export.graphs.lower`).
    """
    nodes = [n for n in model.graph if n.op_type == "Attention" and is_plain(n)]
    nodes = [n for n in nodes if _tokens(n, sizes) >= FEWEST_TOKENS]
    for node in nodes:
        to_multi_head(model, node)
    return len(nodes)


def _tokens(node: ir.Node, sizes: Mapping[str, int]) -> int:
    """Return how many tokens look at each other; 0 where keys are others than queries, or their number is fixed."""
    queries, keys = (node.inputs[i].shape[1] for i in (0, 1))
    if not isinstance(queries, ir.SymbolicDim) or queries != keys:
        return 0
    try:
        return value_of(ast.parse(str(queries.value), mode="eval").body, sizes)
    except (KeyError, SyntaxError):  # not a formula of these sizes
        return 0


def value_of(formula: ast.AST, sizes: Mapping[str, int]) -> int:
    """Return the value of a formula of whole numbers, as ((height - 1)//2 + 1)*width. Raise KeyError for others."""
    match formula:
        case ast.BinOp(left, operation, right):
            return int(OPERATORS[type(operation)](value_of(left, sizes), value_of(right, sizes)))
        case ast.Name(name):
            return sizes[name]
        case ast.Constant(int(number)):
            return number
    raise KeyError(ast.dump(formula))
