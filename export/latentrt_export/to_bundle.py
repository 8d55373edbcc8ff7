"""Export: a checkpoint becomes a bundle."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir

from latentrt.bundle.bundle import write_manifest
from latentrt.bundle.manifest import Golden, GraphSpec, Islands, LatentSpec, ModelSpec, TensorSpec
from latentrt.errors import BundleError, ExportError, LatentrtError
from latentrt.model.tokenizer import Tokenizer
from latentrt_export.checkpoint.source import SCHEDULE, Checkpoint, checkpoint_of
from latentrt_export.graphs import passes
from latentrt_export.graphs.cuda_graph import cuda_path, for_cuda
from latentrt_export.graphs.half import half_path, to_half
from latentrt_export.graphs.ranges import measure_networks, overflowing
from latentrt_export.graphs.to_onnx import quiet, trace
from latentrt_export.graphs.weights import share_weights
from latentrt_export.graphs.wrap import load_network
from latentrt_export.place import place

GRAPHS = {
    "text_encoder": "text_encoder/model.onnx",
    "text_encoder_2": "text_encoder_2/model.onnx",
    "unet": "unet/model.onnx",
    "vae_decoder": "vae/decoder.onnx",
    "vae_encoder": "vae/encoder.onnx",
}
LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder")
GRAPH_ROOM = 4 * 2**20  # bytes per network for its graph, when free space is checked


class Progress(Protocol):
    """Told before each part of an export: its name, how many parts are done, how many there are."""

    def __call__(self, part: str, done: int, total: int) -> None: ...


Measure = Callable[[Path, ModelSpec], tuple[Golden, ...]]


@dataclass(frozen=True, slots=True)
class NetworkSummary:
    """What exporting one network took and gave; bytes are of the graph, the weights it shares, and its sidecar."""

    seconds: float
    nodes: int
    graph_bytes: int
    shared_bytes: int
    sidecar_bytes: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What an export made: one entry per network, and the bytes of the whole bundle."""

    networks: Mapping[str, NetworkSummary]
    total_bytes: int

    @property
    def shared_bytes(self) -> int:
        """Weight bytes that graphs read from the checkpoint's safetensors."""
        return sum(n.shared_bytes for n in self.networks.values())

    @property
    def sidecar_bytes(self) -> int:
        """Weight bytes that had to be written again."""
        return sum(n.sidecar_bytes for n in self.networks.values())


def export_bundle(
    source: str | Path,
    target: str | Path,
    *,
    revision: str | None = None,
    variant: str | None = None,
    progress: Progress = lambda part, done, total: None,
    overwrite: bool = False,
    golden: Measure | None = None,
) -> Summary:
    """Turn the checkpoint `source` into the bundle `target`.

    Args:
        source: a diffusers folder, a hub id, or preset:NAME (see `latentrt_export.checkpoint.presets`).
        target: a folder; `source` itself adds the graphs to the checkpoint (with `overwrite`).
        revision, variant: as in `open_checkpoint`.
        progress: called before each part.
        overwrite: replace a bundle that is there. A folder that is no bundle is never replaced.
        golden: measures golden runs on the finished bundle; they go into its manifest.

    Raises:
        ExportError: the checkpoint is none, or cannot be served.
        UnsafeWeightsError: it has pickled weights only.
        OutputError: the target exists, or cannot be written, or has no room.
    """
    with checkpoint_of(source, revision, variant) as checkpoint:
        return _export(checkpoint, Path(target), variant, progress, overwrite, golden)


def _export(
    checkpoint: Checkpoint,
    target: Path,
    variant: str | None,
    progress: Progress,
    overwrite: bool,
    golden: Measure | None,
) -> Summary:
    networks = (*checkpoint.text_encoders, "unet", "vae_decoder", "vae_encoder")
    parts = ("copy", *networks, "half precision", "manifest")
    size = sum(path.stat().st_size for path in checkpoint.files.values()) + 2 * GRAPH_ROOM * len(networks)
    with place(target, checkpoint.root, size, overwrite=overwrite) as root:
        progress("copy", 0, len(parts))
        _copy(checkpoint, root)
        graphs, summaries = {}, {}
        for done, name in enumerate(networks, start=1):
            progress(name, done, len(parts))
            graphs[name], summaries[name] = _export_network(checkpoint, root, name)
        progress("half precision", len(parts) - 2, len(parts))
        spec = _add_half(root, _model_spec(checkpoint, graphs, variant))
        progress("manifest", len(parts) - 1, len(parts))
        _write_manifest(root, spec, golden)
        total = sum(path.stat().st_size for path in _files(root))
    return Summary(summaries, total)


def _copy(checkpoint: Checkpoint, root: Path) -> None:
    """Copy real bytes: ONNX Runtime refuses weights behind links, and a hub cache is made of links."""
    for name, path in checkpoint.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)
    for folder in checkpoint.tokenizers:
        if not (root / folder / "tokenizer.json").is_file():
            _tokenizer(checkpoint, folder).write_json(root / folder / "tokenizer.json")
    index = {k: [None, None] if k in NOT_EXPORTED else v for k, v in checkpoint.index.items()}
    if checkpoint.family == "sd":
        index["requires_safety_checker"] = False
    (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _export_network(checkpoint: Checkpoint, root: Path, name: str) -> tuple[GraphSpec, NetworkSummary]:
    start, path = time.perf_counter(), root / GRAPHS[name]
    with _named(name), quiet():
        network = load_network(root, name, family=checkpoint.family, tokens=_tokens(checkpoint))
        model = trace(network)
        passes.clean(model)
        shared = share_weights(model, _weights(checkpoint, root, path.parent), path.with_suffix(".extra.safetensors"))
        ir.save(model, path)
    seconds = time.perf_counter() - start
    summary = NetworkSummary(seconds, len(model.graph), path.stat().st_size, shared.shared, shared.sidecar)
    return _graph_spec(GRAPHS[name], model), summary


def _add_half(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write every network's half graph beside the float32 one, and beside that its form for ONNX Runtime on CUDA.

    What would overflow in one small run stays in float32.
    """
    half, cuda, islands = {}, {}, {}
    for name, ranges in measure_networks(root, spec).items():
        path = spec.graphs[name].path
        model = ir.load(root / path)
        largest = float(np.max([*ranges.values()]))  # keeps a NaN
        if not math.isfinite(largest):
            raise ExportError(
                f"the {name} computes numbers that are not finite", needed="a sound checkpoint", fix="download it again"
            )
        islands[name] = Islands(float(f"{largest:.3g}"), overflowing(model, ranges))
        to_half(model, islands[name].nodes)
        half[name] = _save(root, half_path(path), model)
        for_cuda(model)
        cuda[name] = _save(root, cuda_path(path), model)
    return replace(spec, half=half, islands=islands, cuda=cuda)


def _save(root: Path, path: str, model: ir.Model) -> GraphSpec:
    ir.save(model, root / path)
    return _graph_spec(path, model)


def _graph_spec(path: str, model: ir.Model) -> GraphSpec:
    graph = model.graph
    return GraphSpec(path, model.opset_imports[""], len(graph), _signature(graph.inputs), _signature(graph.outputs))


@contextmanager
def _named(network: str) -> Iterator[None]:
    """Say which network could not be loaded or traced; torch and its libraries raise anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LatentrtError) or (isinstance(error, OSError) and error.errno):
            raise  # transformers has OSErrors of its own, without a number
        raise ExportError(
            f"the {network} cannot be exported ({type(error).__name__}: {error})",
            needed="a network that diffusers can load and torch can trace",
            fix="check that diffusers can run the checkpoint; latentrt doctor shows the versions",
        ) from error


def _weights(checkpoint: Checkpoint, root: Path, folder: Path) -> list[Path]:
    paths = (root / name for name in checkpoint.files if name.endswith(".safetensors"))
    return sorted(path for path in paths if path.parent == folder)


def _tokenizer(checkpoint: Checkpoint, folder: str) -> Tokenizer:
    try:
        return Tokenizer.open(checkpoint.root / folder)
    except BundleError as error:
        raise ExportError(error.found, needed=error.needed, fix="download the checkpoint again") from error


def _tokens(checkpoint: Checkpoint) -> int:
    """Length of a text chunk, as the engine will see it."""
    return len(_tokenizer(checkpoint, checkpoint.tokenizers[0]).encode("").ids)


def _signature(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(
            str(value.name),
            value.dtype.numpy().name if value.dtype else "",
            tuple(size if isinstance(size, int) else str(size) for size in value.shape or ()),
        )
        for value in values
    )


def _model_spec(checkpoint: Checkpoint, graphs: Mapping[str, GraphSpec], variant: str | None) -> ModelSpec:
    return ModelSpec(
        id=checkpoint.id,
        revision=checkpoint.revision,
        license=checkpoint.license,
        family=checkpoint.family,
        latents=_latents(checkpoint.configs["vae"], checkpoint.configs["unet"]),
        tokenizers=checkpoint.tokenizers,
        text_encoders=checkpoint.text_encoders,
        schedule=SCHEDULE,
        graphs=graphs,
        zero_negative=bool(checkpoint.index.get("force_zeros_for_empty_prompt", checkpoint.family == "sdxl")),
        made=_made(checkpoint, variant),
    )


def _latents(vae: Mapping[str, Any], unet: Mapping[str, Any]) -> LatentSpec:
    size = unet.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return LatentSpec(
        channels=vae.get("latent_channels", 4),
        factor=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
        scale=float(vae.get("scaling_factor", 0.18215)),
        shift=float(vae.get("shift_factor") or 0.0),
        height=height,
        width=width,
    )


def _made(checkpoint: Checkpoint, variant: str | None) -> dict[str, Any]:
    """How the bundle was made, without dates and paths: exporting twice gives the same bytes."""
    options = {"revision": checkpoint.revision, "variant": variant}
    command = ["latentrt", "export", checkpoint.id, *(f"--{k}={v}" for k, v in options.items() if v)]
    return {"command": " ".join(command), "versions": {name: version(name) for name in LIBRARIES}}


def _write_manifest(root: Path, spec: ModelSpec, golden: Measure | None) -> None:
    names = [path.relative_to(root).as_posix() for path in _files(root)]
    write_manifest(root, spec, names)
    if golden is not None:
        write_manifest(root, replace(spec, golden=golden(root, spec)), names)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
