"""A checkpoint's part of the manifest: latents, schedule, defaults, how the bundle was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import onnx_ir as ir

from latentrt.bundle.spec import (
    CONDITIONER,
    CONTROL,
    CONTROLNET,
    CONTROLNET_UNION,
    DECODER,
    DENOISER,
    ENCODER,
    HINT,
    IP_ADAPTER,
    MODEL,
    SHALLOW,
    T2I_ADAPTER,
    Correction,
    Defaults,
    LatentSpec,
    ModelSpec,
    NetworkSpec,
    TensorSpec,
)
from latentrt.errors import BundleError, ExportError
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.sampling.schedule import Schedule
from latentrt.values import is_whole
from latentrt_export.checkpoint.add_ons import ip_adapter
from latentrt_export.checkpoint.corrections import corrections_of, drawn_by
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.lone_control import ADAPTER, FULL_XL, PART, UNION, adapter_factor, hint_levels
from latentrt_export.checkpoint.served import (
    EDITING,
    EXTRA,
    INPAINTING,
    LOW,
    LOW_LATENTS,
    TINY,
    beside,
    upscales_latents,
    vae_class,
    vae_factor,
)
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import LOW_SCHEDULE, SCHEDULE, Checkpoint, tokenizer_of

GRAPHS = {  # where a bundle has each network's graph
    "text_encoder": "text_encoder/model.onnx",
    "text_encoder_2": "text_encoder_2/model.onnx",
    "unet_text": "unet/text.onnx",
    "unet": "unet/model.onnx",
    "unet_shallow": "unet/shallow.onnx",
    "vae_decoder": "vae/decoder.onnx",
    "vae_encoder": "vae/encoder.onnx",
    "hint": "controlnet/hint.onnx",
    "controlnet_text": "controlnet/text.onnx",
    "controlnet": "controlnet/model.onnx",
    "t2i_adapter": "t2i_adapter/model.onnx",
    "t2i_adapter_scaled": "t2i_adapter/scaled.onnx",
    "image_encoder": "image_encoder/model.onnx",
    "ip_adapter": "ip_adapter/model.onnx",
}
ROLES = {  # all others are text encoders
    "unet_text": CONDITIONER,
    "unet": DENOISER,
    "unet_shallow": SHALLOW,
    "vae_decoder": DECODER,
    "vae_encoder": ENCODER,
    "hint": HINT,
    "controlnet_text": CONDITIONER,
    "controlnet": CONTROL,
    "t2i_adapter": HINT,
    "t2i_adapter_scaled": CONTROL,
    "image_encoder": HINT,
    "ip_adapter": CONDITIONER,
}

ADD_ONS = {ADAPTER: T2I_ADAPTER, ip_adapter.PART: IP_ADAPTER}  # kinds by their parts; ControlNets are of two
LCM, PIX2PIX, XL_PIX2PIX, UPSCALER = (4, 8.5), (20, 7.5), (20, 5.0), (75, 9.0)  # steps and guidance
MAX_NOISE_LEVEL = 350  # diffusers' own default
TRACING, WRITING = ("torch", "diffusers", "transformers"), ("onnx", "onnx-ir", "onnxscript")  # libraries


def model_spec(checkpoint: Checkpoint, networks: Mapping[str, NetworkSpec], how: Mapping[str, Any]) -> ModelSpec:
    """Return the manifest's model part."""
    configs, enlarges = checkpoint.configs, beside(checkpoint.configs) == LOW
    control = configs.get(PART)
    xl = "text_encoder_2" in configs
    return ModelSpec(
        id=checkpoint.id,
        revision=checkpoint.revision,
        license=checkpoint.license,
        latents=latents_of(checkpoint),
        schedule=SCHEDULE if checkpoint.scheduler else None,
        networks=networks,
        zero_negative=bool(checkpoint.index.get("force_zeros_for_empty_prompt", xl)),
        scaled_picture=bool(checkpoint.index.get("is_cosxl_edit")),
        keeps_steps=checkpoint.pipeline.startswith("LatentConsistencyModel"),  # with an image-to-image of its own
        classes=None if enlarges else configs.get("unet", {}).get("num_class_embeds"),
        low_schedule=LOW_SCHEDULE if enlarges else None,
        max_noise_level=_max_noise_level(checkpoint) if enlarges else None,
        defaults=_defaults(checkpoint),
        corrections=_corrections(checkpoint),
        made=how,
        kind=_kind(configs),
        conditional_only=bool(control and control.get("global_pool_conditions")),
    )


def _kind(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a bundle's kind by its networks' configs."""
    if PART in configs:
        return CONTROLNET_UNION if configs[PART].get("_class_name") == UNION else CONTROLNET
    return next((kind for part, kind in ADD_ONS.items() if part in configs), MODEL)


def notes_of(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """Return what a user should know of how the checkpoint was opened and its settings are taken, one sentence each."""
    if not spec.draws:
        return checkpoint.notes
    schedule = Schedule.from_config(checkpoint.scheduler, spec.corrected(SCHEDULE))
    ignored = (f"{SCHEDULE}: {key} is ignored; no scheduler has it" for key in schedule.unknown_keys)
    return (
        *checkpoint.notes,
        *ignored,
        *map(str, spec.corrections),
        *([f"{SCHEDULE}: {why}"] if (why := schedule.not_served()) else ()),
    )


def made(checkpoint: Checkpoint, variant: str | None, choices: Choices) -> dict[str, Any]:
    """Return how the bundle was made, without dates and paths: exporting twice gives the same bytes."""
    options = {"revision": checkpoint.revision, "variant": variant}
    given = [*(f"--{k}={v}" for k, v in options.items() if v), *choices.options]
    command = " ".join(["latentrt", "export", checkpoint.id, *given])
    notes = {"notes": list(checkpoint.notes)} if checkpoint.notes else {}
    libraries = WRITING if checkpoint.graphs else (*TRACING, *WRITING)
    return {"command": command, **notes, "versions": {name: version(name) for name in libraries}}


def open_tokenizer(checkpoint: Checkpoint, folder: str) -> Tokenizer:
    """Return the tokenizer in a folder of the checkpoint. Raise ExportError where it is damaged."""
    try:
        return Tokenizer.open(checkpoint.root / folder)
    except BundleError as error:
        raise ExportError(error.found, needed=error.needed, fix="download the checkpoint again") from error


def tokens_of(checkpoint: Checkpoint) -> int:
    """Return the length of a text chunk, as the engine will see it; 0 where the model reads no text."""
    folders = list(map(tokenizer_of, checkpoint.text_encoders))
    return len(open_tokenizer(checkpoint, folders[0]).encode("").ids) if folders else 0


def signature(values: Sequence[ir.Value]) -> tuple[TensorSpec, ...]:
    """Return the specs of a graph's inputs or outputs."""
    return tuple(
        TensorSpec(
            str(value.name),
            value.dtype.numpy().name if value.dtype else "",
            tuple(size if isinstance(size, int) else str(size) for size in value.shape or ()),
        )
        for value in values
    )


def _corrections(checkpoint: Checkpoint) -> tuple[Correction, ...]:
    configs = checkpoint.configs
    if "unet" not in configs:
        return ()
    pipeline = drawn_by(checkpoint.pipeline, masked=beside(configs) == INPAINTING)
    vae = configs.get("vae", {})
    return corrections_of(pipeline, checkpoint.scheduler, configs["unet"], checkpoint.scheduler_class, vae)


def latents_of(checkpoint: Checkpoint) -> LatentSpec:
    """Return the shape and range of what a checkpoint's UNet denoises.

    Graphs that exist already, and k-diffusion's blocks, double what they halved: sides must halve evenly. Other graphs
    of `graphs.wrap` take all sides.
    """
    if PART in checkpoint.configs:
        return _of_control(checkpoint.configs[PART])
    if ADAPTER in checkpoint.configs:
        return _of_adapter(checkpoint.configs[ADAPTER])
    if ip_adapter.PART in checkpoint.configs:
        return LatentSpec(4, 8, 1.0, 0.0, 64, 64)  # it reads none
    if "unet" not in checkpoint.configs:
        return _alone(checkpoint.configs["vae"])
    unet, vae = ({**checkpoint.configs.get(name, {}), **_corrected(checkpoint, name)} for name in ("unet", "vae"))
    if "vae" not in checkpoint.configs:
        return _pixels(unet)
    latents = _latents(unet, vae)
    even = bool(checkpoint.graphs) or upscales_latents(unet)
    return replace(latents, multiple=_halved(unet, (320, 640, 1280, 1280))) if even else latents


def _corrected(checkpoint: Checkpoint, network: str) -> dict[str, Any]:
    file = f"{network}/config.json"
    return {each.key: each.value for each in _corrections(checkpoint) if each.file == file}


def _max_noise_level(checkpoint: Checkpoint) -> int:
    """Return how much noise the picture to enlarge may get: as diffusers' pipeline allows and its UNet knows."""
    most = checkpoint.index.get("max_noise_level", MAX_NOISE_LEVEL)
    if not is_whole(most) or most < 0:
        raise ExportError(f"model_index.json has max_noise_level {most!r}", needed="a whole number")
    levels = read_json(checkpoint.files[LOW_SCHEDULE]).get("num_train_timesteps", 1000)
    return int(min(most, levels - 1, checkpoint.configs["unet"]["num_class_embeds"] - 1))


def _latents(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    height, width = _size(unet)
    return LatentSpec(
        channels=vae.get("latent_channels", 4),
        factor=vae_factor(vae),
        scale=float(vae.get("scaling_factor", 1.0 if vae_class(vae) == TINY else 0.18215)),
        shift=float(vae.get("shift_factor") or 0.0),
        height=height,
        width=width,
    )


def _alone(vae: Mapping[str, Any]) -> LatentSpec:
    """Return the latents of a VAE without a model; AutoencoderTiny's config has no size."""
    factor = vae_factor(vae)
    size = vae.get("sample_size", 64 * factor if vae_class(vae) == TINY else 32)
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    return _latents({"sample_size": [max(1, side // factor) for side in sides]}, vae)


def _of_control(control: Mapping[str, Any]) -> LatentSpec:
    """Return the latents that a ControlNet reads; a config has neither a size of theirs nor a scale."""
    return LatentSpec(control.get("in_channels", 4), 2 ** (hint_levels(control) - 1), 1.0, 0.0, 64, 64)


def _of_adapter(adapter: Mapping[str, Any]) -> LatentSpec:
    """Return the latents of the sizes that a T2I-Adapter's features have been made for; it reads none itself.

    The type for XL has its first features at half their sides, since an SDXL UNet halves them in its first block.
    """
    multiple = 2 if adapter.get("adapter_type") == FULL_XL else 1
    return LatentSpec(4, adapter_factor(adapter) // multiple, 1.0, 0.0, 64, 64, multiple)


def _pixels(unet: Mapping[str, Any]) -> LatentSpec:
    """Return a UNet2DModel's latents. Its upsamplers get no sizes: sides must halve evenly once for each block down."""
    height, width = _size(unet)
    multiple = _halved(unet, (224, 448, 672, 896))
    return LatentSpec(unet.get("in_channels", 3), 1, 1.0, 0.0, height, width, multiple)


def _halved(unet: Mapping[str, Any], default: Sequence[int]) -> int:
    """Return what a UNet's levels divide sides by; `default` are its channels where the config has none."""
    return int(2 ** (len(unet.get("block_out_channels", default)) - 1))


def _size(unet: Mapping[str, Any]) -> tuple[int, int]:
    size = unet.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _defaults(checkpoint: Checkpoint) -> Defaults:
    """Return the pipeline's defaults: 1000 steps for DDPMPipeline; 50 for DDIMPipeline, by DDIM with any scheduler;
    those of LatentConsistencyModelPipeline for UNets that read the guidance scale; those of InstructPix2Pix and of the
    latent upscaler.
    """
    trained = int(checkpoint.scheduler.get("num_train_timesteps", 1000))
    if checkpoint.pipeline == "DDPMPipeline":
        return Defaults(min(1000, trained), 1.0)
    if checkpoint.pipeline == "DDIMPipeline":
        return Defaults(min(50, trained), 1.0, "ddim")
    if EXTRA.get(checkpoint.pipeline) == LOW_LATENTS:
        return Defaults(*UPSCALER)
    if checkpoint.configs.get("unet", {}).get("time_cond_proj_dim") is not None:
        return Defaults(*LCM)
    if EXTRA.get(checkpoint.pipeline) == EDITING:
        return Defaults(*(XL_PIX2PIX if "text_encoder_2" in checkpoint.configs else PIX2PIX))
    return Defaults()
