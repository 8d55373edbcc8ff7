"""Open a folder of ONNX graphs that exist already: optimum's export of a pipeline, or diffusers' own of 2022.

Such a folder has the configs, tokenizers and scheduler of the checkpoint that it was made from, but graphs in the place
of weights: unet/model.onnx, vae_decoder/model.onnx and so on. Only JSON is read here.
https://huggingface.co/docs/optimum-onnx, diffusers' pipeline_onnx_stable_diffusion.py
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import MANIFEST
from latentrt.errors import ExportError
from latentrt_export.checkpoint.files import license_of, read_json, read_schedule, tokenizer_files
from latentrt_export.checkpoint.served import DEPTH, EXTRA, LOW, LOW_LATENTS, check_networks, unsupported
from latentrt_export.checkpoint.source import (
    CLASSES,
    PIPELINES,
    PIXELS,
    SCHEDULE,
    UNET,
    UNETS,
    VAE,
    Checkpoint,
    check_class,
    named_class,
    tokenizer_of,
)

GRAPH = "model.onnx"
DECODER, ENCODER = "vae_decoder", "vae_encoder"
PREFIXES = ("ORT", "Onnx")  # of the classes that optimum and diffusers draw with; the rest is the pipeline's own name
TRACED = (DEPTH, LOW, LOW_LATENTS)  # what graphs that exist already do not read beside the latents
SERVED = tuple(name for name, parts in PIPELINES.items() if parts != PIXELS and EXTRA.get(name) not in TRACED)
# diffusers' own folders have no configs: its pipeline of 2022 knows one size and one VAE.
PLAIN_UNET: Mapping[str, Any] = {"sample_size": 64, "block_out_channels": [320, 640, 1280, 1280]}
PLAIN_VAE: Mapping[str, Any] = {"scaling_factor": 0.18215, "block_out_channels": [128, 256, 512, 512]}
EXPORT_AGAIN = "optimum-cli export onnx --model CHECKPOINT FOLDER, or export the checkpoint itself"


def is_onnx_folder(source: str | Path) -> bool:
    """Return whether a source is a folder of ONNX graphs without the weights that they were made from."""
    unet = Path(source) / UNET
    return (unet / GRAPH).is_file() and not any(unet.glob("diffusion_pytorch_model*.safetensors"))


def open_onnx_folder(root: Path) -> Checkpoint:
    """Open a folder for which `is_onnx_folder` holds; the graphs themselves are not read.

    Returns:
        A checkpoint whose `graphs` name the networks. A folder without a VAE encoder gives one without it.

    Raises:
        ExportError: it has no graph for a network, or is of a pipeline that the engine cannot serve.
    """
    if (root / MANIFEST).is_file():
        raise ExportError(f"{root} is a bundle", needed="a checkpoint, or optimum's ONNX export of one")
    index = read_json(root / "model_index.json")
    plain = str(index.get("_class_name")).startswith("Onnx")
    index = {**index, "_class_name": _pipeline(index)}
    if index.get("requires_aesthetics_score"):
        raise unsupported("an SDXL refiner (requires_aesthetics_score)", "an SDXL base model")
    parts = PIPELINES[index["_class_name"]]
    texts = [part for part in parts if tokenizer_of(part)]
    graphs = {name: root / name / GRAPH for name in (*texts, UNET, DECODER, ENCODER)}
    missing = [name for name, path in graphs.items() if not path.is_file()]
    for name in missing:
        if name != ENCODER:
            raise ExportError(f"{root} has no {name}/{GRAPH}", needed="a graph for every network", fix=EXPORT_AGAIN)
    configs = _configs(root, texts, index["_class_name"], plain=plain)
    check_networks(configs, UNETS[parts], index["_class_name"])
    files = {SCHEDULE: root / SCHEDULE, **_texts(root)}
    for part in texts:
        folder = tokenizer_of(part)
        check_class(index, folder, CLASSES[folder])
        files |= {f"{folder}/{name}": path for name, path in tokenizer_files(root / folder).items()}
    homes = {part: DECODER if part == VAE else part for part in configs}
    own = {f"{part}/config.json": root / home / "config.json" for part, home in homes.items()}
    files |= {name: path for name, path in own.items() if path.is_file()}
    return Checkpoint(
        root=root,
        id=root.resolve().name,
        revision=None,
        license=license_of(root),
        index=index,
        configs=configs,
        scheduler=read_schedule(root / SCHEDULE, named_class(index.get("scheduler"))),
        files=files,
        graphs={name: path for name, path in graphs.items() if name not in missing},
        notes=tuple(f"{name}: the folder has none; pictures are drawn from prompts only" for name in missing),
    )


def _pipeline(index: Mapping[str, Any]) -> str:
    """Return the diffusers class that index names, under whichever of its names."""
    kind = str(index.get("_class_name"))
    name = next((kind.removeprefix(prefix) for prefix in PREFIXES if kind.startswith(prefix)), kind)
    if name.endswith("Legacy"):  # repaints with a UNet of four channels
        name = "StableDiffusionPipeline"
    if name not in SERVED:
        raise ExportError(f"model_index.json names the pipeline {kind!r}", needed=f"one of {', '.join(SERVED)}")
    return name


def _configs(root: Path, texts: list[str], pipeline: str, *, plain: bool) -> dict[str, dict[str, Any]]:
    """Return the networks' configs as `Checkpoint` has them; `plain` folders may lack them."""
    homes = {**{part: part for part in texts}, UNET: UNET, VAE: DECODER}
    channels = {"in_channels": 9} if pipeline == "StableDiffusionInpaintPipeline" else {}
    known: dict[str, Mapping[str, Any]] = {UNET: {**PLAIN_UNET, **channels}, VAE: PLAIN_VAE} if plain else {}
    configs = {}
    for part, home in homes.items():
        path = root / home / "config.json"
        configs[part] = dict(known.get(part, {})) if plain and not path.is_file() else read_json(path)
    return configs


def _texts(root: Path) -> dict[str, Path]:
    """Return the licence and the model card."""
    kept = [path for path in sorted(root.iterdir()) if path.name.startswith(("LICENSE", "NOTICE", "README"))]
    return {path.name: path for path in kept if path.is_file()}
