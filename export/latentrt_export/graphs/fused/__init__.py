"""Passes for ONNX Runtime's CUDA provider: its fused operators, with channels last.

Each pass is one function of a model in place; it returns how many places it changed. The operators:
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from latentrt_export.graphs.fused.attention import packed_products
from latentrt_export.graphs.fused.layout import channels_last
from latentrt_export.graphs.fused.norms import group_norms, skip_group_norms
from latentrt_export.graphs.fused.tokens import (
    bias_adds,
    bias_gelus,
    bias_split_gelus,
    layer_norm_biases,
    pointwise_products,
    quick_gelus,
    skip_layer_norms,
)

Pass = Callable[[ir.Model], int]
# In this order: the sum goes to the norm behind it, if there is one, and only what loses its bias becomes a MatMul.
PASSES: tuple[Pass, ...] = (
    group_norms,
    channels_last,
    skip_group_norms,
    skip_layer_norms,
    layer_norm_biases,
    bias_split_gelus,
    bias_gelus,
    bias_adds,
    pointwise_products,
    packed_products,
    quick_gelus,
)


def run_passes(model: ir.Model, passes: Sequence[Pass] = PASSES) -> dict[str, int]:
    """Run the passes on a graph of opset 21, in place; return how many places each changed, by its name."""
    return {run.__name__: run(model) for run in passes}
