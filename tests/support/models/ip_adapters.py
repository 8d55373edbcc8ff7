"""Small random IP-Adapters, as files that their authors publish, with the image encoder beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from latentrt_export.checkpoint.add_ons.ip_adapter import IpAdapter
from latentrt_export.graphs.modules.ip_adapter import ImagePrompt

ENCODER = {
    "hidden_size": 24,
    "intermediate_size": 48,
    "projection_dim": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "image_size": 28,
    "patch_size": 7,
    "hidden_act": "gelu",
}


def tiny_ip_adapter(file: Path, base: Path, kind: str) -> None:
    """Write an IP-Adapter for the UNet of a checkpoint, in float16 if it is a base, and image_encoder/ beside it."""
    file.parent.mkdir(parents=True)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    attentions = [name.removesuffix(".processor") for name in unet.attn_processors if "attn2" in name]
    channels = tuple(unet.get_submodule(name).to_q.out_features for name in attentions)
    torch.manual_seed(0)
    encoder = _drawn(CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER)))  # the same for all kinds
    cross = unet.config.cross_attention_dim
    own = {
        "base": IpAdapter("base", 20, 4, cross, channels),
        "plus": IpAdapter("plus", 24, 16, cross, channels, 32, 4, 2),
        "full": IpAdapter("full", 24, 0, cross, channels),
    }[kind]
    model = _drawn(ImagePrompt(own).model)
    encoder.save_pretrained(file.parent / "image_encoder")
    dtype = torch.float16 if kind == "base" else torch.float32
    save_file({name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}, file)


def _drawn(module: Any) -> Any:
    """Return a module with random weights, large enough that a picture changes what is drawn."""
    with torch.no_grad():
        for name, value in module.named_parameters():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return module
