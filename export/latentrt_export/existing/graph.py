"""A network's graph of an ONNX folder in the form of export's own: contract, opset and weights beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common

from latentrt_export.checkpoint.onnx_folder import ENCODER, is_onnx_folder, open_onnx_folder
from latentrt_export.checkpoint.source import Checkpoint
from latentrt_export.describe import GRAPHS, latents_of
from latentrt_export.existing import forms
from latentrt_export.existing.attention import fuse_attention
from latentrt_export.existing.contract import Contract, contract_of, fulfil, gives_moments
from latentrt_export.existing.probe import check_same, set_shapes
from latentrt_export.existing.reading import external, read_graph
from latentrt_export.existing.widen import widen
from latentrt_export.graphs import passes
from latentrt_export.graphs.weights import share_weights

DATA, SIDECAR = ".onnx_data", ".weights.safetensors"


def open_graphs(source: str | Path) -> Checkpoint | None:
    """Open a folder of ONNX graphs and check them all; None where the source is none.

    Returns:
        Its checkpoint. `files` has the data beside its graphs too. A VAE encoder whose mean and variance cannot be told
        is left out, and `notes` say so.

    Raises:
        ExportError, UnsafePathError: as `open_onnx_folder`, `read_graph` and `contract_of`.
    """
    if not is_onnx_folder(source):
        return None
    checkpoint = open_onnx_folder(Path(source))
    files = dict(checkpoint.files)
    for name, path in list(checkpoint.graphs.items()):
        model = read_graph(path, checkpoint.root)
        if name == ENCODER and not gives_moments(model.graph, latents_of(checkpoint).channels):
            checkpoint = _without_encoder(checkpoint)
            continue
        widen(model)
        fulfil(model, contract_of(model, checkpoint, name))
        if (data := _data(model)) is not None:
            files[str(Path(GRAPHS[name]).with_suffix(DATA))] = path.parent / data
    return replace(checkpoint, files=files)


def _without_encoder(checkpoint: Checkpoint) -> Checkpoint:
    graphs = {name: path for name, path in checkpoint.graphs.items() if name != ENCODER}
    note = f"{ENCODER}: left out, it draws latents by random numbers of its own; pictures are drawn from prompts only"
    return replace(checkpoint, graphs=graphs, notes=(*checkpoint.notes, note))


def existing_graph(checkpoint: Checkpoint, root: Path, name: str) -> ir.Model:
    """Return a network's graph, its weights in files of the bundle at `root`, in the folder of the graph.

    Raises:
        ExportError: it does not run at all sizes, or gives other numbers than the folder's own graph.
    """
    path = checkpoint.graphs[name]
    model = read_graph(path, checkpoint.root)
    contract = contract_of(model, checkpoint, name)
    widen(model)
    fulfil(model, contract)
    multiple = _multiple(checkpoint, name)
    _simplify(model, contract, path, multiple)
    _place(model, root / GRAPHS[name])
    check_same(model, contract, path, (root / GRAPHS[name]).parent, multiple)
    return model


def _multiple(checkpoint: Checkpoint, name: str) -> int:
    """Return what a network's sides are multiples of."""
    latents = latents_of(checkpoint)
    return latents.step if name == ENCODER else latents.multiple


def _simplify(model: ir.Model, contract: Contract, path: Path, multiple: int) -> None:
    """Bring a graph into the forms that export's passes know, in place."""
    _fold(model)
    set_shapes(model, contract, path.parent, multiple, path.parent.name)
    forms.static_sizes(model)
    forms.fills(model)
    _fold(model)
    forms.fills(model)
    forms.drop_expansions(model)
    _fold(model)
    passes.static_reshapes(model)
    passes.drop_unused(model)
    fuse_attention(model)
    forms.flat_by_reshape(model)
    forms.fuse_layer_norm(model)
    forms.fuse_gelu(model)
    forms.split_halves(model)
    forms.norms_of_their_own_shape(model)
    common.ShapeInferencePass(data_prop=False)(model)


def _fold(model: ir.Model) -> None:
    passes.fold_constants(model)
    passes.drop_no_ops(model)


def _data(model: ir.Model) -> str | None:
    """Return the one file beside a graph that has all its external weights; None where there is none, or several."""
    names = {str(tensor.location) for tensor in external(model)}
    return next(iter(names)) if len(names) == 1 else None


def _place(model: ir.Model, path: Path) -> None:
    """Point every weight at its bytes beside the bundle's graph: at a copy of the data, or at a new safetensors."""
    if _data(model) is not None:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.ExternalTensor(
                    path.with_suffix(DATA).name,
                    tensor.offset,
                    tensor.length,
                    tensor.dtype,
                    shape=tensor.shape,
                    name=str(value.name),
                    base_dir=path.parent,
                )
    else:
        for value in model.graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    share_weights(model, [], path.with_suffix(SIDECAR), small=True)
