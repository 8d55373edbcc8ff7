"""Small random ControlNets for the small random checkpoints, as diffusers saves them."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import torch
from diffusers import ControlNetModel, ControlNetUnionModel, UNet2DConditionModel

EMBEDDING = (8, 16)  # as many levels as the small VAEs have: factor 2
UNION = 5  # of a ControlNet Union
POOLS, SMALL = 3, 4  # numbers of one that reads BGR and pools its residuals, and of one that reads no text


def tiny_controlnet(folder: Path, base: Path, number: int) -> Path:
    """Write a ControlNet of the structure of a checkpoint's UNet; every weight is random, its zero convolutions too.

    Args:
        folder: where it goes; it is also returned.
        base: the checkpoint.
        number: the seed of the weights.
    """
    torch.manual_seed(number)
    variant = "fp16" if any((base / "unet").glob("*.fp16*")) else None
    unet = UNet2DConditionModel.from_pretrained(base / "unet", variant=variant)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)
    if number == POOLS:
        network.register_to_config(global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    if number == SMALL:  # as diffusers/controlnet-canny-sdxl-1.0-small
        small = {"down_block_types": ["DownBlock2D"] * 2, "mid_block_type": "UNetMidBlock2D"}
        network = ControlNetModel.from_config({**network.config, **small})
    if number == UNION:
        own = {key: value for key, value in network.config.items() if key in signature(ControlNetUnionModel).parameters}
        network = ControlNetUnionModel(**own, num_trans_channel=16, num_trans_head=2, num_proj_channel=16)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder, safe_serialization=True)
    return folder
