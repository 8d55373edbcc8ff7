"""Checkpoints whose model_index.json names one of SDXL's pipelines for pictures: opened, exported, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from latentrt import Engine
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from tests.support.models.checkpoints import tiny_sdxl

PSNR_BOUND = 70.0  # dB
y, x = np.mgrid[:16, :24] / 24
PICTURE = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
MASK = Image.fromarray((np.hypot(x - 0.4, y - 0.3) < 0.2).astype(np.uint8) * 255)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "image": ("StableDiffusionXLImg2ImgPipeline", {}),
    "4 channels": ("StableDiffusionXLInpaintPipeline", {}),
    "9 channels": ("StableDiffusionXLInpaintPipeline", {"in_channels": 9}),
}


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_its_pipeline_draws(tmp_path: Path, case: str) -> None:
    kind, unet = CASES[case]
    index = {"_class_name": kind, "requires_aesthetics_score": False}
    with quiet():
        source = tiny_sdxl(tmp_path / "xl", unet=unet, index=index)
    export_bundle(source, tmp_path / "bundle")
    masked = "Inpaint" in kind
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(source)
        pipe.set_progress_bar_config(disable=True)
        more = {"mask_image": MASK, "height": 16, "width": 24} if masked else {}
        (theirs,) = pipe(
            "a cat",
            image=PICTURE,
            negative_prompt="a",
            num_inference_steps=5,
            strength=0.6,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(7),
            **more,
        ).images
    assert type(pipe).__name__ == kind
    with Engine.load(tmp_path / "bundle", threads=1) as engine:
        settings: dict[str, Any] = {"steps": 5, "strength": 0.6, "guidance": 4.0, "seed": 7, "negative_prompt": "a"}
        (ours,) = engine("a cat", image=PICTURE, **settings, **({"mask": MASK} if masked else {}))
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= PSNR_BOUND
