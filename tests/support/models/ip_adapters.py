"""Small random IP-Adapters, as files that their authors publish, with the image encoder beside them."""

from __future__ import annotations

from pathlib import Path

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


def tiny_ip_adapter(
    file: Path, base: Path, *, plus: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Path:
    """Write an IP-Adapter for the UNet of a checkpoint, and image_encoder/ beside it; return the file."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel.from_pretrained(base / "unet")
    channels = tuple(
        unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        for name in unet.attn_processors
        if name.endswith("attn2.processor")
    )
    encoder = CLIPVisionModelWithProjection(CLIPVisionConfig(**ENCODER))
    with torch.no_grad():
        for value in encoder.parameters():
            value.normal_(0, 0.2)
    if not (file.parent / "image_encoder").exists():
        encoder.save_pretrained(file.parent / "image_encoder")
    cross = unet.config.cross_attention_dim
    own = IpAdapter(True, 24, 16, cross, channels, 32, 4, 2) if plus else IpAdapter(False, 20, 4, cross, channels)
    model = ImagePrompt(own).model
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    save_file({name: value.to(dtype).contiguous() for name, value in model.state_dict().items()}, file)
    return file
