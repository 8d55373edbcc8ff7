"""Refusals of the engine and the catalog, with the fields' names that A1111's clients know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from latentrt.errors import LatentrtError
from latentrt.serve.http.errors import Problem

NAMES = {  # by OpenAI's names and the engine's
    "n": "batch_size",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "guidance": "cfg_scale",
    "size": "width",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
    "image_guidance": "image_cfg_scale",
    "hires_scale": "hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "hires_strength": "denoising_strength",
    "handoff": "refiner_switch_at",
    "clip_skip": "CLIP_stop_at_last_layers",
    "resize": "resize_mode",
    "seed_delta": "eta_noise_seed_delta",
    "mask_crop": "inpaint_full_res",
    "mask_fill": "inpainting_fill",
    "model": "sd_model_checkpoint",
    "image": "init_images",
}
# Names that are words too are only replaced where a value or a change of them is told.
_OURS = re.compile(
    "|".join(
        (
            rf"\b(?:{'|'.join(name for name in NAMES if '_' in name)})\b",
            rf"\b(?:{'|'.join(name for name in NAMES if '_' not in name)})\b(?= is -?[\d.'])",
            r"(?<=\band )guidance\b(?= [\d.])",
            r"\bguidance\b(?= above )",
            r"(?<=\braise )guidance\b",
            r"(?<=\bsmaller )(?:n|guidance)\b",
        )
    )
)


@contextmanager
def renamed() -> Iterator[None]:
    """Let refusals name fields as A1111's API does."""
    try:
        yield
    except LatentrtError as error:
        if isinstance(error, Problem):
            error.param = NAMES.get(error.param or "", error.param)
        error.found, error.needed, error.fix = map(_told, (error.found, error.needed, error.fix))
        raise


def _told(text: str) -> str:
    return _OURS.sub(lambda found: NAMES[found[0]], text)
