"""Export: turn a checkpoint into a bundle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from latentrt.bundle.bundle import MANIFEST, write_manifest
from latentrt.bundle.golden import Golden
from latentrt.bundle.spec import (
    CONTROL,
    DENOISER,
    FP32,
    HINT,
    SHALLOW,
    TEXT_ENCODER,
    ModelSpec,
    NetworkSpec,
    TensorSpec,
    Variant,
)
from latentrt.errors import ExportError, LatentrtError
from latentrt.runtime.variants import check_int8
from latentrt_export.checkpoint.add_ons import ip_adapter
from latentrt_export.checkpoint.lone_control import ADAPTER, PART
from latentrt_export.checkpoint.single.choices import AS_THEY_ARE, Choices
from latentrt_export.checkpoint.source import Checkpoint, checkpoint_of, tokenizer_of
from latentrt_export.describe import (
    GRAPHS,
    ROLES,
    latents_of,
    made,
    model_spec,
    notes_of,
    open_tokenizer,
    signature,
    tokens_of,
)
from latentrt_export.existing.graph import existing_graph, open_graphs
from latentrt_export.existing.variants import checked
from latentrt_export.graphs.parts.control import add_chain, scaled_hints, sides_of
from latentrt_export.graphs.parts.cut import drop_unused_inputs
from latentrt_export.graphs.parts.hoist import hoist
from latentrt_export.graphs.parts.shallow import shallow
from latentrt_export.graphs.text_inputs import add_text_inputs
from latentrt_export.graphs.weights import share_weights
from latentrt_export.int8 import add_int8
from latentrt_export.place import place
from latentrt_export.variants import add_adapters, add_control, add_cpu, add_half, add_image_prompts

NOT_EXPORTED = ("safety_checker", "feature_extractor", "image_encoder", "depth_estimator", "watermarker")
GRAPH_ROOM = 4 * 2**20  # bytes per network for its graph, when free space is checked


class Progress(Protocol):
    """Called before each part of an export with its name, the number of parts done, and the number of parts."""

    def __call__(self, part: str, done: int, total: int) -> None: ...


Measure = Callable[[Path, ModelSpec], tuple[Golden, ...]]


@dataclass(frozen=True, slots=True)
class NetworkSummary:
    """The time and the bytes of one exported network: its graph, the weights it shares, and its sidecar."""

    seconds: float
    nodes: int
    graph_bytes: int
    shared_bytes: int
    sidecar_bytes: int

    def and_(self, other: NetworkSummary) -> NetworkSummary:
        """Return the sums of both."""
        return NetworkSummary(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of an export: one entry per network, the bytes of the whole bundle, and what a user should know."""

    networks: Mapping[str, NetworkSummary]
    total_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def shared_bytes(self) -> int:
        """Weight bytes that graphs read from the checkpoint's own files."""
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
    choices: Choices = AS_THEY_ARE,
    progress: Progress = lambda part, done, total: None,
    overwrite: bool = False,
    golden: Measure | None = None,
    int8: bool = False,
) -> Summary:
    """Turn the checkpoint `source` into the bundle `target`.

    Args:
        source: a diffusers folder, of a model or of a VAE alone, a hub id, a single .safetensors file, preset:NAME
            (see `latentrt_export.checkpoint.presets.make`), or a folder of ONNX graphs (see
            `latentrt_export.checkpoint.onnx_folder`), which needs no torch.
        target: a folder; `source` itself adds the graphs to the checkpoint (with `overwrite`).
        revision, variant: as in `open_checkpoint`.
        choices: what the user decides about the source.
        progress: called before each part.
        overwrite: replace an existing bundle. A folder that is no bundle is never replaced.
        golden: measures golden runs on the finished bundle; they go into its manifest.
        int8: also write the denoiser's 8-bit graph for CPUs, see `add_int8`.

    Raises:
        ExportError: it is no checkpoint, or one that cannot be served.
        UnsafeWeightsError: it has pickled weights only.
        OutputError: the target exists, or cannot be written, or has no room.
    """
    with _opened(source, revision, variant, choices) as checkpoint:
        how = made(checkpoint, variant, choices)
        return _export(checkpoint, Path(target), how, progress, overwrite, golden, int8, choices.adapters)


def _export(
    checkpoint: Checkpoint,
    target: Path,
    how: Mapping[str, Any],
    progress: Progress,
    overwrite: bool,
    golden: Measure | None,
    int8: bool,
    adapters: bool,
) -> Summary:
    names = networks_of(checkpoint)
    parts = ("copy", *names, "half precision", "manifest")
    sources = {*checkpoint.files.values(), *checkpoint.graphs.values()}
    size = sum(path.stat().st_size for path in sources) + 2 * GRAPH_ROOM * len(names)
    for option, asked in (("--int8", int8), ("--adapters", adapters)):
        if asked and "unet" not in names:
            found = f"{option} for {checkpoint.id}, which has {', '.join(names)}"
            raise ExportError(found, needed="a model with a UNet", fix="leave it out")
    if int8:
        check_int8()  # it draws with the graph
    with place(target, checkpoint.root, size, overwrite=overwrite) as root:
        if not checkpoint.graphs:
            _check(checkpoint)
        progress("copy", 0, len(parts))
        _copy(checkpoint, root)
        networks, summaries = dict[str, NetworkSpec](), dict[str, NetworkSummary]()
        for done, name in enumerate(names, start=1):
            progress(name, done, len(parts))
            made_of, summaries[name] = _export_network(checkpoint, root, name)
            networks |= made_of
        progress("half precision", len(parts) - 2, len(parts))
        spec, remarks = model_spec(checkpoint, networks, how), tuple[str, ...]()
        if checkpoint.graphs:
            spec, remarks = checked(root, spec, (add_half, add_cpu))
        elif ip_adapter.PART not in checkpoint.configs:  # whose networks run in float32, once a picture
            spec = add_image_prompts(root, add_control(root, add_cpu(root, add_half(root, spec))))
            spec = add_adapters(root, spec) if adapters else spec
        if int8:
            spec, note = add_int8(root, spec)
            remarks = (*remarks, note)
        progress("manifest", len(parts) - 1, len(parts))
        total = finish(root, spec, golden)
    return Summary(summaries, total, (*notes_of(checkpoint, spec), *remarks))


@contextmanager
def _opened(source: str | Path, revision: str | None, variant: str | None, choices: Choices) -> Iterator[Checkpoint]:
    """Yield a folder of ONNX graphs, or else a checkpoint."""
    graphs = open_graphs(source)
    if graphs is not None and (variant is not None or choices.options):
        given = " ".join([*([f"--variant={variant}"] if variant else []), *choices.options])
        raise ExportError(f"{given} for the ONNX graphs in {source}", needed="none of them", fix="leave it out")
    opened = checkpoint_of(source, revision, variant, choices) if graphs is None else nullcontext(graphs)
    with opened as checkpoint:
        yield checkpoint


def _check(checkpoint: Checkpoint) -> None:
    """Refuse networks that could not be loaded, all of them before the first one is exported."""
    from latentrt_export.checkpoint.complete import check_complete  # brings torch
    from latentrt_export.graphs.to_onnx import quiet

    for part in checkpoint.configs:
        with _named(part), quiet():
            check_complete(checkpoint, part)


def networks_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the names of the networks that a bundle of this checkpoint has."""
    if checkpoint.graphs:
        return tuple(checkpoint.graphs)
    if PART in checkpoint.configs:
        return ("hint", PART)
    if ADAPTER in checkpoint.configs:
        return (ADAPTER,)
    if ip_adapter.PART in checkpoint.configs:
        return (ip_adapter.ENCODER, ip_adapter.PART)
    unet = ["unet"] if "unet" in checkpoint.configs else []
    return (*checkpoint.text_encoders, *unet, *(("vae_decoder", "vae_encoder") if "vae" in checkpoint.configs else ()))


def _copy(checkpoint: Checkpoint, root: Path) -> None:
    """Copy real bytes: ONNX Runtime refuses weights behind links, and a hub cache is made of links."""
    for name, path in checkpoint.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, root / name)
    for folder in map(tokenizer_of, checkpoint.text_encoders):
        if not (root / folder / "tokenizer.json").is_file():
            open_tokenizer(checkpoint, folder).write_json(root / folder / "tokenizer.json")
    if not checkpoint.graphs and "unet" in checkpoint.configs:  # diffusers opens no ONNX, and no pipeline of a VAE
        index = plain_index(checkpoint)
        (root / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def plain_index(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return model_index.json with the exported networks only."""
    index = {key: [None, None] if key in NOT_EXPORTED else value for key, value in checkpoint.index.items()}
    return index | ({"requires_safety_checker": False} if "safety_checker" in index else {})


def _export_network(checkpoint: Checkpoint, root: Path, name: str) -> tuple[dict[str, NetworkSpec], NetworkSummary]:
    """Write a network's graphs: its own, that of the text before it, and beside a UNet's the shallow one."""
    start, summary = time.perf_counter(), NetworkSummary(0.0, 0, 0, 0, 0)
    specs = {}
    with _named(name):
        model = _graph(checkpoint, root, name)
        graphs: dict[str, ir.Model | None] = {name: model}
        if name == PART:
            add_chain(model, pools=bool(checkpoint.configs[PART].get("global_pool_conditions")))
            graphs = {"controlnet_text": hoist(model, ["encoder_hidden_states"]), **graphs}
            drop_unused_inputs(model.graph)
        if name == ADAPTER:
            graphs |= {f"{ADAPTER}_scaled": scaled_hints(model, latents_of(checkpoint).factor)}
        if name == "unet":
            graphs = {"unet_text": hoist(model, ["encoder_hidden_states"]), **graphs, "unet_shallow": shallow(model)}
        for each, graph in graphs.items():
            if graph is not None:
                specs[each], size = _write(checkpoint, root, each, graph)
                summary = summary.and_(size if each != "unet_shallow" else replace(size, shared_bytes=0))  # unet's own
    return specs, replace(summary, seconds=time.perf_counter() - start)


def _graph(checkpoint: Checkpoint, root: Path, name: str) -> ir.Model:
    """Return a network's float32 graph: the folder's own, or one that is traced."""
    if checkpoint.graphs:
        return existing_graph(checkpoint, root, name)
    from latentrt_export.graphs.to_onnx import traced_graph  # brings torch

    model = traced_graph(root, name, tokens_of(checkpoint))
    if name in checkpoint.text_encoders:
        add_text_inputs(model)
    return model


def _write(checkpoint: Checkpoint, root: Path, name: str, model: ir.Model) -> tuple[NetworkSpec, NetworkSummary]:
    path = root / GRAPHS[name]
    shared = share_weights(model, _weights(checkpoint, root, path.parent), path.with_suffix(".extra.safetensors"))
    ir.save(model, path)
    inputs, outputs = signature(model.graph.inputs), signature(model.graph.outputs)
    if ROLES.get(name) in (DENOISER, SHALLOW):  # the tracer writes sizes in its own form, as 4*(height//4)
        outputs = tuple(replace(each, shape=inputs[0].shape) if each.name == "out" else each for each in outputs)
    if ROLES.get(name) in (HINT, CONTROL):
        outputs = tuple(_leveled(each, value) for each, value in zip(outputs, model.graph.outputs, strict=True))
    if name == "vae_encoder" and not checkpoint.graphs and (factor := latents_of(checkpoint).factor) > 1:
        halved = (f"(height//{factor})", f"(width//{factor})")  # and ((height - 1)//8) + 1 of strided convolutions
        outputs = tuple(replace(each, shape=(*each.shape[:2], *halved)) for each in outputs)
    variant = Variant(GRAPHS[name], model.opset_imports[""], len(model.graph))
    spec = NetworkSpec(ROLES.get(name, TEXT_ENCODER), inputs, outputs, {FP32: variant}, tokenizer_of(name) or None)
    return spec, NetworkSummary(0.0, len(model.graph), path.stat().st_size, shared.shared, shared.sidecar)


def _leveled(tensor: TensorSpec, value: ir.Value) -> TensorSpec:
    """Return a tensor of a level of a UNet, or of a hint, with its sides by the latents' own, where it has sides."""
    leveled = len(tensor.shape) == 4
    return replace(tensor, shape=(*tensor.shape[:2], *sides_of(value))) if leveled else tensor


@contextmanager
def _named(network: str) -> Iterator[None]:
    """Add the network's name to an error of loading or tracing; torch and its libraries raise anything."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LatentrtError) or (isinstance(error, OSError) and error.errno):
            raise  # transformers has OSErrors of its own, without a number
        raise ExportError(
            f"the {network} cannot be exported ({type(error).__name__}: {error})",
            needed="a network that diffusers can load and torch can trace, or a graph that optimum exported",
            fix="check that diffusers, or optimum, can run it; latentrt doctor shows the versions",
        ) from error


def _weights(checkpoint: Checkpoint, root: Path, folder: Path) -> list[Path]:
    paths = (root / name for name in checkpoint.files if name.endswith(".safetensors"))
    return sorted(path for path in paths if path.parent == folder)


def finish(root: Path, spec: ModelSpec, golden: Measure | None) -> int:
    """Write the manifest of a bundle whose files are all there, with golden runs; return its bytes."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    names = [path.relative_to(root).as_posix() for path in files]
    write_manifest(root, spec, names)
    if golden is not None and spec.draws:
        write_manifest(root, replace(spec, golden=golden(root, spec)), names)
    return sum(path.stat().st_size for path in (*files, root / MANIFEST))
