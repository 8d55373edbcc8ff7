"""A network of a checkpoint as a lean graph: loaded by diffusers and transformers, traced by torch, cleaned."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from latentrt_export.graphs import passes
from latentrt_export.graphs.to_onnx import quiet, trace
from latentrt_export.graphs.wrap import load_network


def traced_graph(root: Path, name: str, tokens: int) -> ir.Model:
    """Return a network's float32 graph; its initializers have the names of the parameters, after `passes.PREFIX`.

    Args:
        root, name, tokens: as in `load_network`.
    """
    with quiet():
        model = trace(load_network(root, name, tokens=tokens))
        passes.clean(model)
    return model
