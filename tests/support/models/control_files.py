"""Small random ControlNets as single files, in LDM's names and in diffusers'.

The names are made from diffusers' by rules of their own, not by the export's tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor

from tests.support.models.single_file import LAYERS, UNET, unet_name

Tensors = dict[str, Tensor]
EMBEDDING = (8, 16, 24, 32)  # channels of the hint's
XL_SIZES = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}


def controlnet_of(family: str, folder: Path, **changes: Any) -> ControlNetModel:
    """Save a family's small ControlNet in a folder, and return it: "sd1", "sd2" or "xl"; `changes` of its config."""
    torch.manual_seed(0)
    sizes = XL_SIZES if family == "xl" else {}
    unet = UNet2DConditionModel(**{**UNET[family], **sizes}, layers_per_block=LAYERS)
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=EMBEDDING)
    if changes:
        network = ControlNetModel.from_config({**network.config, **changes})
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    return network


def ldm_tensors(network: ControlNetModel, prefix: str = "control_model.") -> Tensors:
    """Return a ControlNet's weights under LDM's names."""
    state = network.state_dict()
    return {prefix + _name(name, state): tensor for name, tensor in state.items()}


def _name(name: str, state: Tensors) -> str:
    if found := re.match(r"controlnet_down_blocks\.(\d+)\.(.*)", name):
        return f"zero_convs.{found[1]}.0.{found[2]}"
    if found := re.match(r"controlnet_cond_embedding\.(conv_in|conv_out|blocks\.(\d+))\.(.*)", name):
        last = 2 * len(EMBEDDING) - 1
        number = {"conv_in": 0, "conv_out": last}.get(found[1], int(found[2] or 0) + 1)
        return f"input_hint_block.{2 * number}.{found[3]}"
    if name.startswith("controlnet_mid_block."):
        return name.replace("controlnet_mid_block", "middle_block_out.0")
    return unet_name(name, state)
