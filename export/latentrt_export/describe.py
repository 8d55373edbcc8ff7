"""A checkpoint's part of the manifest: latents, schedule, defaults, how the bundle was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import onnx_ir as ir

from latentrt.bundle.spec import Correction, Defaults, LatentSpec, ModelSpec, NetworkSpec, TensorSpec
from latentrt.sampling.schedule import Schedule
from latentrt_export.checkpoint.corrections import UNET, corrections_of, drawn_by
from latentrt_export.checkpoint.served import beside
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import SCHEDULE, Checkpoint

LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")


def model_spec(checkpoint: Checkpoint, networks: Mapping[str, NetworkSpec], how: Mapping[str, Any]) -> ModelSpec:
    """Return the manifest's model part."""
    configs = checkpoint.configs
    xl = "text_encoder_2" in configs
    corrections = _corrections(checkpoint)
    unet = {**configs["unet"], **{each.key: each.value for each in corrections if each.file == UNET}}
    return ModelSpec(
        id=checkpoint.id,
        revision=checkpoint.revision,
        license=checkpoint.license,
        latents=_latents(unet, configs["vae"]) if "vae" in configs else _pixels(unet),
        schedule=SCHEDULE,
        networks=networks,
        zero_negative=bool(checkpoint.index.get("force_zeros_for_empty_prompt", xl)),
        classes=configs["unet"].get("num_class_embeds"),
        defaults=_defaults(checkpoint),
        corrections=corrections,
        made=how,
    )


def notes_of(checkpoint: Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """Return what a user should know of how the checkpoint's settings are taken, one sentence each."""
    schedule = Schedule.from_config(checkpoint.scheduler, spec.corrected(SCHEDULE))
    ignored = (f"{SCHEDULE}: {key} is ignored; no scheduler has it" for key in schedule.unknown_keys)
    corrected = (
        f"{each.file}: {each.key} is {each.found!r}, and drawn with {each.value!r} ({each.why})"
        for each in spec.corrections
    )
    return (*ignored, *corrected, *([f"{SCHEDULE}: {why}"] if (why := schedule.not_served()) else ()))


def made(checkpoint: Checkpoint, variant: str | None, choices: Choices) -> dict[str, Any]:
    """Return how the bundle was made, without dates and paths: exporting twice gives the same bytes."""
    options = {"revision": checkpoint.revision, "variant": variant}
    given = [*(f"--{k}={v}" for k, v in options.items() if v), *choices.options]
    command = " ".join(["latentrt", "export", checkpoint.id, *given])
    notes = {"notes": list(checkpoint.notes)} if checkpoint.notes else {}
    return {"command": command, **notes, "versions": {name: version(name) for name in LIBRARIES}}


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
    pipeline = drawn_by(checkpoint.pipeline, masked=beside(checkpoint.configs) > 0)
    _, named = checkpoint.index.get("scheduler") or (None, None)
    return corrections_of(pipeline, checkpoint.scheduler, checkpoint.configs["unet"], named)


def _latents(unet: Mapping[str, Any], vae: Mapping[str, Any]) -> LatentSpec:
    height, width = _size(unet)
    return LatentSpec(
        channels=vae.get("latent_channels", 4),
        factor=2 ** (len(vae.get("block_out_channels", (64,))) - 1),
        scale=float(vae.get("scaling_factor", 0.18215)),
        shift=float(vae.get("shift_factor") or 0.0),
        height=height,
        width=width,
    )


def _pixels(unet: Mapping[str, Any]) -> LatentSpec:
    """Return a UNet2DModel's latents. Its upsamplers get no sizes: sides must halve evenly once for each block down."""
    height, width = _size(unet)
    multiple = 2 ** (len(unet.get("block_out_channels", (224, 448, 672, 896))) - 1)
    return LatentSpec(unet.get("in_channels", 3), 1, 1.0, 0.0, height, width, multiple)


def _size(unet: Mapping[str, Any]) -> tuple[int, int]:
    size = unet.get("sample_size") or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return height, width


def _defaults(checkpoint: Checkpoint) -> Defaults:
    """Return the pipeline's defaults: 1000 steps for DDPMPipeline; 50 for DDIMPipeline, by DDIM with any scheduler."""
    trained = int(checkpoint.scheduler.get("num_train_timesteps", 1000))
    if checkpoint.pipeline == "DDPMPipeline":
        return Defaults(min(1000, trained), 1.0)
    if checkpoint.pipeline == "DDIMPipeline":
        return Defaults(min(50, trained), 1.0, "ddim")
    return Defaults()
