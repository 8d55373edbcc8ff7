"""Small random checkpoints of kinds that differ from their family by a few settings, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from tests.support.models.checkpoints import tiny_sd, tiny_sdxl

LCM = {"time_cond_proj_dim": 40}  # not the UNet's channels, 16
PIX2PIX = {"in_channels": 8}
MAKERS: Mapping[str, Callable[[Path], Path]] = {
    "lcm": partial(
        tiny_sd,
        unet=LCM,
        scheduler={"_class_name": "LCMScheduler"},
        index={"_class_name": "LatentConsistencyModelPipeline", "requires_safety_checker": False},
    ),
    "lcm-sdxl": partial(tiny_sdxl, unet=LCM),
    "sdxl-old": partial(tiny_sdxl, second={"eos_token_id": 2}),  # as SDXL's own: pooled at the highest id
    "pix2pix": partial(tiny_sd, unet=PIX2PIX, index={"_class_name": "StableDiffusionInstructPix2PixPipeline"}),
    "pix2pix-sdxl": partial(tiny_sdxl, unet=PIX2PIX, index={"_class_name": "StableDiffusionXLInstructPix2PixPipeline"}),
}
