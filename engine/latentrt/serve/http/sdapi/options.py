"""A1111's options: what `override_settings` and `/options` may set.

Those that would make another picture than the one drawn here are refused by name, unless they have the value at which
they do nothing. All others, of hundreds, tell A1111 how to show and store pictures: they are taken and without effect.
The server keeps no options: `/options` takes those that hold anyway.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/shared_options.py, 1.10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentrt.request import MAX_SEED
from latentrt.serve.http.errors import Problem, answer_to_validation
from latentrt.serve.http.openai.schema import WHOLE

MOST_LAYERS = 12  # of CLIP_stop_at_last_layers
FORMATS = {"png": "png", "jpg": "jpeg", "jpeg": "jpeg", "webp": "webp"}
# Options and fields with the values at which they do nothing; the first is what they have here.
IDLE: dict[str, tuple[Any, ...]] = {
    # Fields of a request.
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "script_name": ("", "None"),
    "infotext": ("",),
    "disable_extra_networks": (False,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "firstpass_image": ("",),
    "latent_mask": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "clip_skip": (1,),
    "background": (False, None),  # of the Images API
    "webhook_url": ("", None),
    # Both.
    "s_churn": (0,),
    "s_min_uncond": (0,),
    "initial_noise_multiplier": (1,),
    # Options alone.
    "sd_vae": ("Automatic", "None", ""),
    "sd_unet": ("Automatic", "None", ""),
    "sd_hypernetwork": ("None", ""),
    "randn_source": ("CPU",),
    "sigma_min": (0,),
    "sigma_max": (0,),
    "rho": (0,),
    "k_sched_type": ("Automatic",),
    "sd_noise_schedule": ("Default",),
    "always_discard_next_to_last_sigma": (False,),
    "sgm_noise_multiplier": (False,),
    "skip_early_cond": (0,),
    "s_min_uncond_all": (False,),
    "beta_dist_alpha": (0.6,),
    "beta_dist_beta": (0.6,),
    "token_merging_ratio": (0,),
    "token_merging_ratio_img2img": (0,),
    "token_merging_ratio_hr": (0,),
    "img2img_extra_noise": (0,),
    "img2img_color_correction": (False,),
    "img2img_fix_steps": (False,),
    "img2img_background_color": ("#ffffff",),
    "inpainting_mask_weight": (1,),
    "return_mask": (False,),
    "return_mask_composite": (False,),
    "face_restoration": (False,),
    "emphasis": ("Original",),
    "comma_padding_backtrack": (20,),
    "sdxl_crop_top": (0,),
    "sdxl_crop_left": (0,),
    "use_old_emphasis_implementation": (False,),
    "use_old_karras_scheduler_sigmas": (False,),
    "use_old_hires_fix_width_height": (False,),
    "use_old_scheduling": (False,),
    "use_downcasted_alpha_bar": (False,),
}


class Options(BaseModel):
    """Those that are followed."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    sd_model_checkpoint: str | None = None
    CLIP_stop_at_last_layers: Annotated[Annotated[int, Field(ge=1, le=MOST_LAYERS), WHOLE] | None, Field()] = None
    eta_noise_seed_delta: Annotated[Annotated[int, Field(ge=0, le=MAX_SEED), WHOLE] | None, Field()] = None
    eta_ancestral: Annotated[float, Field(ge=0, le=1)] | None = None
    eta_ddim: Annotated[float, Field(ge=0, le=1)] | None = None
    s_noise: Annotated[float, Field(ge=0, le=10)] | None = None
    samples_format: str | None = None


def options_of(values: Mapping[str, Any] | None) -> Options:
    """Return the options that a request overrides.

    Raises:
        Problem: one that is not followed, or a value that it cannot have.
    """
    try:
        options = Options.model_validate(dict(values or {}))
    except ValidationError as error:
        answer = answer_to_validation(error.errors())
        raise Problem(answer.message, needed="another value", param=answer.param) from error
    if (kind := options.samples_format) is not None and kind.lower() not in FORMATS:
        raise Problem(f"samples_format is {kind[:40]!r}", needed=f"one of {', '.join(FORMATS)}", param="samples_format")
    check_idle(options.model_extra or {})
    return options


def check_idle(values: Mapping[str, Any]) -> None:
    """Refuse fields that would need features this server does not have. Raise Problem."""
    for name, value in values.items():
        if value is not None and name in IDLE and _plain(value) not in IDLE[name]:
            raise Problem(f"{name} is set", needed="what is supported here", fix=f"leave {name} out", param=name)


def present(model: str) -> dict[str, Any]:
    """Return the options that hold, of those that change pictures."""
    own: dict[str, Any] = {"sd_model_checkpoint": model, "sd_checkpoint_hash": "", "samples_format": "png"}
    own |= {"CLIP_stop_at_last_layers": 1, "eta_noise_seed_delta": 0, "eta_ancestral": 1.0, "eta_ddim": 0.0}
    fields = list(IDLE).index("s_churn")
    return {**own, "s_noise": 1.0, **{name: values[0] for name, values in list(IDLE.items())[fields:]}}


def check_present(values: Mapping[str, Any], model: str) -> None:
    """Refuse options that would have to be kept for later requests. Raise Problem."""
    given = options_of(values).model_dump(exclude_unset=True, exclude={"sd_model_checkpoint"})
    for name, value in present(model).items():
        if name in Options.model_fields and given.get(name) not in (None, value):
            fix = "send it with each request, in override_settings"
            raise Problem(f"{name} is {given[name]!r}, and options are not kept here", f"{value!r}", fix, param=name)


def _plain(value: Any) -> Any:
    """Return a number or a truth that came as text, as itself."""
    if not isinstance(value, str):
        return value
    try:
        plain = json.loads(value.lower())
    except ValueError:
        return value
    return plain if isinstance(plain, bool | int | float) else value
