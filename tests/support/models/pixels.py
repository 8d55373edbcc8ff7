"""Small random checkpoints of pixel models: `UNet2DModel` with a DDPM or DDIM pipeline, in the layouts people have."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import nn

Options = Mapping[str, Any]
AS_IT_IS: Options = {}
# google/ddpm-celebahq-256's settings, small: one head, sine before cosine, asymmetric padding, epsilon 1e-6.
UNET: Options = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DDPM: Options = {
    "_class_name": "DDPMScheduler",
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "clip_sample": True,
    "num_train_timesteps": 1000,
    "variance_type": "fixed_small",
}


def tiny_pixels(
    folder: Path,
    *,
    unet: Options = AS_IT_IS,
    scheduler: Options = AS_IT_IS,
    pipeline: str = "DDPMPipeline",
    flat: bool = False,
    index: bool = True,
    **save: Any,
) -> Path:
    """Write a DDPM of pixels, like google/ddpm-celebahq-256.

    Args:
        folder: where it goes; it is also returned.
        unet, scheduler: entries of the configs to change.
        pipeline: that model_index.json names.
        flat: configs and weights at the top, as the first ones were published; else each in its folder.
        index: whether there is a model_index.json.
        save: to the network's save_pretrained.
    """
    torch.manual_seed(0)
    network = UNet2DModel(**(UNET | unet))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    nn.Module.to(network, torch.float32).save_pretrained(folder if flat else folder / "unet", **save)
    config = {**DDPM, **scheduler}
    _json((folder if flat else folder / "scheduler") / "scheduler_config.json", config)
    if index:
        parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", config["_class_name"]]}
        _json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": "0.42.1", **parts})
    return folder


def _json(path: Path, data: Options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(data), indent=2) + "\n", encoding="utf-8")
