"""Small random ControlNets for the small random checkpoints, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel

EMBEDDING = (8, 16)  # as many levels as the small VAEs have: factor 2


def tiny_controlnet(folder: Path, base: Path, *, seed: int = 1, **config: Any) -> Path:
    """Write a ControlNet of the structure of a checkpoint's UNet; every weight is random, its zero convolutions too.

    Args:
        folder: where it goes; it is also returned.
        base: the checkpoint.
        seed: of the weights.
        config: entries of its config to change.
    """
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base / "unet", variant=_variant(base / "unet"))
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)
    if config:
        network = ControlNetModel.from_config({**network.config, **config})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder, safe_serialization=True)
    return folder


def _variant(folder: Path) -> str | None:
    return "fp16" if any(folder.glob("*.fp16*")) else None
