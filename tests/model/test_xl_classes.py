"""Checkpoints whose model_index.json names one of SDXL's pipelines for pictures: opened, exported, drawn."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from latentrt import Engine
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr

PSNR_BOUND = 70.0  # dB
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
PICTURE = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
MASK = Image.fromarray((np.hypot(x - 0.4, y - 0.3) < 0.2).astype(np.uint8) * 255)
CASES = {
    "image": ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
    "4 channels": ("sdxl", "StableDiffusionXLInpaintPipeline"),
    "9 channels": ("sdxl-inpainting", "StableDiffusionXLInpaintPipeline"),
}


def of_class(source: Path, folder: Path, kind: str) -> Path:
    """Copy a checkpoint, with another class in its index, as `save_pretrained` of that class writes it."""
    shutil.copytree(source, folder)
    index = folder / "model_index.json"
    own = {"_class_name": kind, **({} if "Inpaint" in kind else {"requires_aesthetics_score": False})}
    index.write_text(json.dumps(json.loads(index.read_text()) | own))
    return folder


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("case", CASES)
def test_it_opens_and_draws_what_its_pipeline_draws(exported: Exported, tmp_path: Path, case: str) -> None:
    name, kind = CASES[case]
    source, bundle = exported(name)
    folder = of_class(source, tmp_path / name, kind)
    opened, plain = open_checkpoint(folder), open_checkpoint(source)
    assert (opened.pipeline, opened.configs, set(opened.files)) == (kind, plain.configs, set(plain.files))
    masked = "Inpaint" in kind
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(folder)
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
    settings: dict[str, Any] = {"steps": 5, "strength": 0.6, "guidance": 4.0, "seed": 7, "negative_prompt": "a"}
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (ours,) = engine("a cat", image=PICTURE, **settings, **({"mask": MASK} if masked else {}))
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= PSNR_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("case", ["image", "4 channels"])
def test_its_export_is_that_of_the_plain_class(exported: Exported, tmp_path: Path, case: str) -> None:
    name, kind = CASES[case]
    source, bundle = exported(name)
    export_bundle(of_class(source, tmp_path / name, kind), tmp_path / "bundle")
    for path in (path for path in bundle.rglob("*") if path.is_file()):
        if path.name not in ("manifest.json", "model_index.json"):
            assert (tmp_path / "bundle" / path.relative_to(bundle)).read_bytes() == path.read_bytes()
