"""What diffusers' pipelines change of a checkpoint's settings when they are made, as data.

Source: the constructors of diffusers 0.42's pipelines. XL's, LCM's and DDPM's change nothing; DDIMPipeline takes the
schedule of any class for DDIM's, which is a default of the model (`latentrt_export.describe`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from latentrt.bundle.spec import Correction
from latentrt.sampling.settings import DEFAULTS
from latentrt_export.checkpoint.source import SCHEDULE

Config = Mapping[str, Any]
UNET, VAE = "unet/config.json", "vae/config.json"

NO_VAE: Config = {}


class Rule(NamedTuple):
    """A setting that a pipeline changes.

    Attributes:
        file, key: the setting.
        wrong: whether the pipeline changes it, by its value and the file's whole config.
        value: what it makes of it.
        why: in words.
    """

    file: str
    key: str
    wrong: Callable[[Any, Config], bool]
    value: Any
    why: str


def _of_old_diffusers(size: Any, config: Config) -> bool:
    """Return whether a UNet's size is only the default that diffusers wrote before version 0.9."""
    version = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version", "")))
    old = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return old and isinstance(size, int) and size < 64


STEPS_OFFSET = Rule(
    SCHEDULE, "steps_offset", lambda value, _: value is not None and value != 1, 1, "timesteps begin at 1 in training"
)
CLIP_SAMPLE = Rule(SCHEDULE, "clip_sample", lambda value, _: value is True, False, "latents are not pixels in -1..1")
SKIP_PRK_STEPS = Rule(
    SCHEDULE, "skip_prk_steps", lambda value, _: value is False, True, "PNDM begins without Runge-Kutta steps"
)
SAMPLE_SIZE = Rule(UNET, "sample_size", _of_old_diffusers, 64, "diffusers before 0.9 wrote its default, 32")

UPSCALED = Rule(
    VAE, "scaling_factor", lambda value, _: value != 0.08333, 0.08333, "it is the upscaler's, whatever the file says"
)

RULES: Mapping[str, tuple[Rule, ...]] = {
    "StableDiffusionPipeline": (STEPS_OFFSET, CLIP_SAMPLE, SAMPLE_SIZE),
    "StableDiffusionInpaintPipeline": (STEPS_OFFSET, SKIP_PRK_STEPS, SAMPLE_SIZE),
    "StableDiffusionDepth2ImgPipeline": (SAMPLE_SIZE,),
    "StableDiffusionUpscalePipeline": (UPSCALED,),
}


def drawn_by(pipeline: str, *, masked: bool = False, scored: bool = False) -> str:
    """Return the pipeline class that draws with a checkpoint of a class: from a prompt, where one does that.

    Args:
        pipeline: the class that model_index.json names.
        masked: whether the UNet reads a mask beside the latents.
        scored: whether it reads an aesthetic score; the one pipeline that gives it begins on a picture.
    """
    if scored:
        return "StableDiffusionXLImg2ImgPipeline"
    plain = pipeline.replace("Img2Img", "").replace("Inpaint", "")
    return plain.replace("Pipeline", "InpaintPipeline") if masked else plain


def corrections_of(
    pipeline: str, scheduler: Config, unet: Config, named: str | None = None, vae: Config = NO_VAE
) -> tuple[Correction, ...]:
    """Return what a pipeline class changes of a checkpoint's settings.

    Args:
        pipeline: the class, of `drawn_by`.
        scheduler, unet: scheduler_config.json and the UNet's config.json.
        named: the scheduler's class in model_index.json, which wins; None where there is none.
        vae: the VAE's config.json.
    """
    written = scheduler.get("_class_name")
    other = named is not None and named != written
    why = "from_pretrained: model_index.json names it"
    first = (Correction(SCHEDULE, "_class_name", written, named, why),) if other else ()
    defaults = DEFAULTS.get(str(named or written), {})
    configs = {SCHEDULE: {**defaults, **scheduler}, UNET: unet, VAE: {"scaling_factor": 0.18215, **vae}}
    return first + tuple(
        Correction(rule.file, rule.key, value, rule.value, f"{pipeline}: {rule.why}")
        for rule in RULES.get(pipeline, ())
        if rule.wrong(value := configs[rule.file].get(rule.key), configs[rule.file])
    )
