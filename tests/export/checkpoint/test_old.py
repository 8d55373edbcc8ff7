"""Checkpoints as diffusers and transformers wrote them in 2022: names of weights, and configs."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from latentrt import Engine
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from tests.support.models.checkpoints import rename_as_of_old, rename_attentions, tiny_sd
from tests.support.models.pixels import tiny_pixels

PSNR_BOUND = 70.0  # dB


def change(path: Path, make: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path.write_text(json.dumps(make(json.loads(path.read_text()))))


def without_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Drop what the class has as a default: old configs lack the keys that came later."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters
    return {key: value for key, value in config.items() if key in parameters and value != parameters[key].default}


def as_whole_clip(config: dict[str, Any]) -> dict[str, Any]:
    """Nest a text encoder's config in CLIP's, as transformers wrote both towers'."""
    return {"model_type": "clip", "architectures": ["CLIPModel"], "projection_dim": 7, "text_config": config}


def of_2022(folder: Path) -> Path:
    tiny_sd(folder, unet={"attention_head_dim": [2, 4], "sample_size": [8, 12]}, index={"_diffusers_version": "0.2.2"})
    rename_as_of_old(folder)
    text = folder / "text_encoder" / "model.safetensors"
    positions = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file({**load_file(text), **positions}, text, {"format": "pt"})
    change(folder / "text_encoder" / "config.json", as_whole_clip)
    change(folder / "unet" / "config.json", without_defaults)
    dropped = ("scaling_factor", "_class_name", "shift_factor", "latents_mean", "latents_std", "force_upcast")
    change(folder / "vae" / "config.json", lambda own: {key: own[key] for key in own if key not in dropped})
    return folder


@pytest.mark.slow
def test_an_sd_of_2022_draws_what_diffusers_draws(tmp_path: Path) -> None:
    with quiet():
        source = of_2022(tmp_path / "old")
    export_bundle(source, tmp_path / "bundle")
    with quiet():
        pipe = StableDiffusionPipeline.from_pretrained(source, safety_checker=None, feature_extractor=None)
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        theirs = pipe("a cat", num_inference_steps=4, guidance_scale=3.0, generator=generator).images[0]
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        (ours,) = engine("a cat", steps=4, seed=3, guidance=3.0)
    assert ours.size == theirs.size == (24, 16)
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= PSNR_BOUND
    assert not list((tmp_path / "bundle").rglob("*.extra.safetensors"))  # every weight was found where it is


@pytest.mark.slow
def test_a_ddpm_of_2022_draws_what_diffusers_draws(tmp_path: Path) -> None:
    with quiet():
        source = tiny_pixels(tmp_path / "old")
    rename_attentions(source / "unet" / "diffusion_pytorch_model.safetensors")
    export_bundle(source, tmp_path / "bundle")
    with quiet():
        pipe = DDPMPipeline.from_pretrained(source)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(num_inference_steps=3, generator=torch.Generator().manual_seed(3)).images[0]
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        (ours,) = engine(steps=3, seed=3)
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= PSNR_BOUND
    assert not list((tmp_path / "bundle").rglob("*.extra.safetensors"))


def test_old_names_in_shards_are_refused_as_diffusers_cannot_load_them(checkpoint: Path, tmp_path: Path) -> None:
    """diffusers renames none there: shards came after these names."""
    rename_as_of_old(checkpoint)
    path = checkpoint / "vae" / "diffusion_pytorch_model.safetensors"
    shard = path.rename(path.with_name("diffusion_pytorch_model-00001-of-00001.safetensors"))
    places = dict.fromkeys(load_file(shard), shard.name)
    path.with_suffix(".safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    open_checkpoint(checkpoint)
    with pytest.raises(Exception, match=r"vae has no weights for .*attentions\.0\.to_"):
        export_bundle(checkpoint, tmp_path / "bundle")
