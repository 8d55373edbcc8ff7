"""Trace one network into an ONNX model whose initializers keep the names of the torch parameters."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import diffusers.utils as diffusers
import onnx_ir as ir
import torch
import transformers.utils as transformers

from latentrt_export.graphs import passes
from latentrt_export.graphs.wrap import Network, load_network

OPSET = 23


def traced_graph(root: Path, name: str, tokens: int) -> ir.Model:
    """Return a network's lean float32 graph; its initializers have the names of the parameters, after `passes.PREFIX`.

    Args:
        root, name, tokens: as in `load_network`.
    """
    with quiet():
        model = trace(load_network(root, name, tokens=tokens))
        passes.clean(model)
    return model


def trace(network: Network) -> ir.Model:
    """Trace a network with torch.export and translate it, unoptimized, to ONNX.

    The torch optimizer would transpose and merge weights, which would no longer match the safetensors. The passes
    of `latentrt_export.graphs.passes` clean up instead.
    """
    axes = {i.name: dict(i.axes) for i in network.inputs}
    dynamic = {name: dict.fromkeys(own, torch.export.Dim.DYNAMIC) for name, own in axes.items()}
    with quiet(), torch.no_grad():
        exported = torch.export.export(
            network.module, (), {i.name: i.example for i in network.inputs}, dynamic_shapes=dynamic, strict=False
        )
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=OPSET,
            optimize=False,
            verbose=False,
            input_names=[i.name for i in network.inputs],
            output_names=list(network.outputs),
            dynamic_shapes=axes,
        )
    assert program is not None
    return program.model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings, log lines and progress bars of torch, diffusers and transformers."""
    before = logging.root.manager.disable
    bars = [module for module in (transformers.logging, diffusers.logging) if module.is_progress_bar_enabled()]
    logging.disable(logging.ERROR)
    for module in bars:
        module.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        for module in bars:
            module.enable_progress_bar()
