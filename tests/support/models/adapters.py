"""Small random T2I-Adapters for the small random checkpoints, as diffusers saves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter

XL: Mapping[str, Any] = {"adapter_type": "full_adapter_xl", "channels": [16, 32], "downscale_factor": 4}
KINDS: Mapping[str, Mapping[str, Any]] = {  # the small VAEs have the factor 2
    "colour": XL,  # for "sd" and "sdxl", whose UNets halve the latents' sides in their first block, as SDXL's
    "grey": {**XL, "in_channels": 1},
    "full": {"adapter_type": "full_adapter", "channels": [16, 32, 32], "downscale_factor": 2},  # for "levels"
    "light": {"adapter_type": "light_adapter", "channels": [16, 32], "downscale_factor": 2},
}


def tiny_adapter(folder: Path, kind: str) -> Path:
    """Write an adapter of KINDS, of random weights; return its folder."""
    torch.manual_seed(len(kind))
    T2IAdapter(num_res_blocks=1, **KINDS[kind]).save_pretrained(folder, safe_serialization=True)
    return folder
