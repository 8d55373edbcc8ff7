"""What diffusers' pipelines draw from the checkpoints of the tests, as their users load and call them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from latentrt_export.graphs.to_onnx import quiet

SETTINGS: dict[str, Any] = {"steps": 4, "seed": 7, "guidance": 4.0, "negative_prompt": "a dog"}


def pipeline(bundle: Path, name: str) -> Any:
    """Return the pipeline of a bundle, which is a checkpoint too; `name` is that of the fixture `exported`."""
    kind = diffusers.StableDiffusionXLPipeline if name == "sdxl" else diffusers.StableDiffusionPipeline
    with quiet():
        pipe = kind.from_pretrained(bundle, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, prompt: str | None, **more: Any) -> NDArray[np.uint8]:
    """Return the pixels of one picture with `SETTINGS`."""
    own = {"negative_prompt": SETTINGS["negative_prompt"], **more}
    generator = torch.Generator().manual_seed(SETTINGS["seed"])
    with quiet():
        (image,) = pipe(
            prompt,
            num_inference_steps=SETTINGS["steps"],
            guidance_scale=SETTINGS["guidance"],
            generator=generator,
            **own,
        ).images
    return np.asarray(image)
