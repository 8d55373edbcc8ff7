"""The part of A1111's API that clients use, and the names of its samplers.

Its clients send dozens of fields, most of them without effect: unknown ones are ignored, and those that would make
another picture (`IDLE`) are refused by name. Two of img2img are always sent, whatever the model: `denoising_strength`
(0.75) and, by webuiapi, `image_cfg_scale` (1.5). Models that read the picture beside the latents begin on noise alone:
they take a denoising strength of 0.75, since the client may not have meant it, and of 1, which is what they do; others
are refused. An image_cfg_scale of 1.5 is one that is not set; others are refused where the model reads none, while
A1111 ignores them.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py and modules/sd_samplers_kdiffusion.py, 1.10; what
Open WebUI and LibreChat send.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from latentrt.request import MAX_SEED
from latentrt.serve.http.openai_schema import WHOLE, Count, Guidance, ImageGuidance, Label, NoiseLevel, Part, Text

# A1111's names with our solvers and the spacing that its "Automatic" means.
SAMPLERS: dict[str, tuple[str, str]] = {
    "DPM++ 2M": ("dpmpp-2m", "Karras"),
    "DPM++ 2M SDE": ("dpmpp-2m-sde", "Karras"),
    "DPM++ 3M SDE": ("dpmpp-3m-sde-kdiffusion", "Karras"),
    "DPM++ 2S a": ("dpmpp-2s-ancestral", "Karras"),
    "Euler a": ("euler-ancestral", ""),
    "Euler": ("euler", ""),
    "LMS": ("lms", ""),
    "Heun": ("heun", ""),
    "DPM2": ("dpm2", "Karras"),
    "DPM2 a": ("dpm2-ancestral", "Karras"),
    "DDIM": ("ddim", ""),
    "PLMS": ("pndm", ""),
    "UniPC": ("unipc", ""),
    "LCM": ("lcm", ""),
}
SCHEDULERS: dict[str, dict[str, Any]] = {
    "Automatic": {},
    "Uniform": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
}
DENOISING_STRENGTH, IMAGE_CFG_SCALE = 0.75, 1.5  # as clients send them that were told nothing
UPSCALERS = ("Latent",)  # of hires fix
# Fields and overridden settings that would make another picture than the one drawn here, with the values at which they
# do nothing.
IDLE: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "script_name": ("", "None"),
    "alwayson_scripts": ({},),
    "subseed_strength": (0,),
    "firstpass_image": ("",),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("", "Use same checkpoint"),
    "hr_sampler_name": ("", "Use same sampler"),
    "hr_scheduler": ("", "Use same scheduler"),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "resize_mode": (0,),
    "inpaint_full_res": (False, 0),
    "initial_noise_multiplier": (1,),
    "s_churn": (0,),
    "clip_skip": (1,),
    "eta_noise_seed_delta": (0,),
    "sd_vae": ("Automatic", "None", ""),
}


class TextToImage(BaseModel):
    """Body of POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, strict=True)

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[Annotated[int, Field(ge=-1, le=MAX_SEED), WHOLE] | None, Field(description="-1 is any.")] = -1
    sampler_name: Annotated[str | None, Field(description="As /sdapi/v1/samplers lists, or a solver's name.")] = None
    sampler_index: str | None = None
    scheduler: Annotated[str | None, Field(description="As /sdapi/v1/schedulers lists.")] = None
    batch_size: Count | None = 1
    n_iter: Count | None = 1
    steps: Count | None = None
    cfg_scale: Guidance | None = None
    width: Count | None = None
    height: Count | None = None
    class_label: Annotated[Label | None, Field(description="latentrt's own: for models that have classes.")] = None
    eta: Annotated[float, Field(ge=0, le=1)] | None = None
    override_settings: Annotated[
        dict[str, Any] | None, Field(description="sd_model_checkpoint; what would change the picture is refused.")
    ] = None
    denoising_strength: Annotated[Part | None, Field(description="Of a picture, or of hires fix's second run.")] = (
        DENOISING_STRENGTH
    )
    enable_hr: bool | None = False
    hr_scale: Annotated[float, Field(ge=1, le=8)] | None = 2.0
    hr_upscaler: Annotated[str | None, Field(description="Latent alone.")] = None
    hr_second_pass_steps: Annotated[Annotated[int, Field(ge=0), WHOLE] | None, Field(description="0: as many.")] = 0
    refiner_checkpoint: Annotated[str | None, Field(description="The server's refiner, by its name or id.")] = None
    refiner_switch_at: Annotated[Part | None, Field(description="Part of the run after which it takes over.")] = None
    send_images: bool | None = True
    force_task_id: Annotated[
        Annotated[str, Field(max_length=128)] | None, Field(description="For /sdapi/v1/progress.")
    ] = None


class ImageToImage(TextToImage):
    """Body of POST /sdapi/v1/img2img."""

    init_images: Annotated[list[str], Field(min_length=1, max_length=1, description="Base64; never a URL.")]
    mask: Annotated[str | None, Field(description="Base64; white is repainted.")] = None
    image_cfg_scale: Annotated[
        ImageGuidance | None, Field(description="Of models that edit the picture as the prompt says.")
    ] = None
    noise_level: Annotated[NoiseLevel | None, Field(description="latentrt's own: of models that enlarge pictures.")] = (
        None
    )
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1), WHOLE] | bool | None = 0


class Images(BaseModel):
    """The answer to both."""

    images: list[str]
    parameters: dict[str, Any]
    info: Annotated[str, Field(description="JSON: all_prompts, all_seeds, infotexts, ...")]


class State(BaseModel):
    """Of the running task, as A1111 tells it."""

    skipped: bool = False
    interrupted: bool = False
    stopping_generation: bool = False
    job: str = ""
    job_count: int = 0
    job_no: int = 0
    sampling_step: int = 0
    sampling_steps: int = 0


class ProgressReport(BaseModel):
    """GET /sdapi/v1/progress."""

    progress: float
    eta_relative: float
    state: State
    current_image: str | None = None
    textinfo: str | None = None


class Sampler(BaseModel):
    """One of /sdapi/v1/samplers."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class Scheduler(BaseModel):
    """One of /sdapi/v1/schedulers."""

    name: str
    label: str


class LoraFile(BaseModel):
    """One of /sdapi/v1/loras."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class Checkpoint(BaseModel):
    """One of /sdapi/v1/sd-models."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None
