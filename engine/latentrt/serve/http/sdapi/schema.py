"""The part of A1111's API that clients use: bodies and answers.

Its clients send dozens of fields, most of them without effect: unknown ones are ignored, and those that would make
another picture (`options.IDLE`) are refused by name. Numbers may come as text, and truths as 0 and 1. Two fields of
img2img are always sent, whatever the model: `denoising_strength` (0.75) and, by webuiapi, `image_cfg_scale` (1.5).
Models that read the picture beside the latents begin on noise alone: they take a denoising strength of 0.75, since the
client may not have meant it, and of 1, which is what they do; others are refused. An image_cfg_scale of 1.5 is one that
is not set; others are refused where the model reads none, while A1111 ignores them.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/models.py and modules/processing.py, 1.10; what Open WebUI and
LibreChat send, and webuiapi 0.9.17.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from latentrt.request import MAX_SEED
from latentrt.serve.http.openai.schema import WHOLE, Count, Guidance, ImageGuidance, Label, NoiseLevel, Part, Text

DENOISING_STRENGTH, IMAGE_CFG_SCALE = 0.75, 1.5  # as clients send them that were told nothing
MASK_BLUR = 4
FILLS = ("fill", "original", "noise", "nothing")  # by inpainting_fill


class TextToImage(BaseModel):
    """Body of POST /sdapi/v1/txt2img."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Text = ""
    negative_prompt: Text = ""
    seed: Annotated[Annotated[int, Field(ge=-1, le=MAX_SEED), WHOLE] | None, Field(description="-1 is any.")] = -1
    subseed: Annotated[Annotated[int, Field(ge=-1, le=MAX_SEED), WHOLE] | None, Field(description="-1 is any.")] = -1
    subseed_strength: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None, Field(description="How much of the subseed's noise there is.")
    ] = 0
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
    eta: Annotated[Annotated[float, Field(ge=0, le=1)] | None, Field(description="Of samplers that have it.")] = None
    s_noise: Annotated[float, Field(ge=0, le=10)] | None = None
    override_settings: Annotated[
        dict[str, Any] | None,
        Field(description="Options for this request; those that would change the picture are done or refused."),
    ] = None
    denoising_strength: Annotated[Part | None, Field(description="Of a picture, or of hires fix's second run.")] = (
        DENOISING_STRENGTH
    )
    enable_hr: bool | None = False
    hr_scale: Annotated[float, Field(ge=1, le=8)] | None = 2.0
    hr_upscaler: Annotated[str | None, Field(description="As /sdapi/v1/latent-upscale-modes lists.")] = None
    hr_second_pass_steps: Annotated[Annotated[int, Field(ge=0), WHOLE] | None, Field(description="0: as many.")] = 0
    refiner_checkpoint: Annotated[str | None, Field(description="The server's refiner, by its name or id.")] = None
    refiner_switch_at: Annotated[Part | None, Field(description="Part of the run after which it takes over.")] = None
    alwayson_scripts: Annotated[
        dict[str, Any] | None, Field(description="controlnet alone: its units as `args`; see /controlnet.")
    ] = None
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
    resize_mode: Annotated[
        Annotated[int, Field(ge=0, le=3), WHOLE] | None,
        Field(description="0: stretch the picture to the size; 1: crop it; 2: fill what is left; 3 is refused."),
    ] = 0
    inpainting_mask_invert: Annotated[int, Field(ge=0, le=1), WHOLE] | None = 0
    mask_blur: Annotated[float, Field(ge=0, le=256)] | None = MASK_BLUR
    mask_blur_x: Annotated[float, Field(ge=0, le=256)] | None = None
    mask_blur_y: Annotated[float, Field(ge=0, le=256)] | None = None
    inpainting_fill: Annotated[
        Annotated[int, Field(ge=0, le=3), WHOLE] | None,
        Field(description="What the run begins on: 0 the colours around, 1 the original, 2 noise, 3 zeros."),
    ] = 0
    inpaint_full_res: Annotated[bool | None, Field(description="Draw the mask's surroundings alone.")] = True
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=65_536), WHOLE] | None = 0


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


class SamplerItem(BaseModel):
    """One of /sdapi/v1/samplers."""

    name: str
    aliases: list[str]
    options: dict[str, str]


class SchedulerItem(BaseModel):
    """One of /sdapi/v1/schedulers."""

    name: str
    label: str


class Checkpoint(BaseModel):
    """One of /sdapi/v1/sd-models."""

    title: str
    model_name: str
    hash: str | None = None
    sha256: str | None = None
    filename: str
    config: str | None = None


class Named(BaseModel):
    """One of lists that tell names alone."""

    name: str


class UpscalerItem(BaseModel):
    """One of /sdapi/v1/upscalers."""

    name: str
    model_name: str | None = None
    model_path: str | None = None
    model_url: str | None = None
    scale: float


class LoraItem(BaseModel):
    """One of /sdapi/v1/loras."""

    name: str
    alias: str
    path: str
    metadata: dict[str, Any] = {}


class EmbeddingItem(BaseModel):
    """One of /sdapi/v1/embeddings: how many vectors it has, and of how many numbers."""

    step: int | None = None
    sd_checkpoint: str | None = None
    sd_checkpoint_name: str | None = None
    shape: int
    vectors: int


class Embeddings(BaseModel):
    """GET /sdapi/v1/embeddings."""

    loaded: dict[str, EmbeddingItem]
    skipped: dict[str, EmbeddingItem] = {}


class Memory(BaseModel):
    """GET /sdapi/v1/memory: bytes of this process, of the machine, and of the GPU."""

    ram: dict[str, Any]
    cuda: dict[str, Any]


class Scripts(BaseModel):
    """GET /sdapi/v1/scripts: that of ControlNets, where the server has some."""

    txt2img: list[str] = []
    img2img: list[str] = []


class PngInfo(BaseModel):
    """Body of POST /sdapi/v1/png-info."""

    image: Annotated[str, Field(description="Base64; never a URL.")]


class PngInfoAnswer(BaseModel):
    """What a picture's file says of how it was made: as text, all its texts, and the text's parts."""

    info: str
    items: dict[str, Any]
    parameters: dict[str, Any]


Visibility = Annotated[float, Field(ge=0, le=1)]


class Extras(BaseModel):
    """What both kinds of enlarging have in common."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    resize_mode: Annotated[
        Annotated[int, Field(ge=0, le=1), WHOLE], Field(description="0: by upscaling_resize; 1: to a size.")
    ] = 0
    show_extras_results: bool = True
    gfpgan_visibility: Annotated[Visibility, Field(description="0 alone.")] = 0
    codeformer_visibility: Annotated[Visibility, Field(description="0 alone.")] = 0
    codeformer_weight: Annotated[Visibility, Field(description="Without effect.")] = 0
    upscaling_resize: Annotated[float, Field(gt=0, le=16)] = 2
    upscaling_resize_w: Count = 512
    upscaling_resize_h: Count = 512
    upscaling_crop: Annotated[bool, Field(description="Crop to the size, where the proportions are others.")] = True
    upscaler_1: Annotated[str, Field(description="As /sdapi/v1/upscalers lists.")] = "None"
    upscaler_2: str = "None"
    extras_upscaler_2_visibility: Visibility = 0
    upscale_first: Annotated[bool, Field(description="Without effect: no faces are restored.")] = False


class ExtrasOfOne(Extras):
    """Body of POST /sdapi/v1/extra-single-image."""

    image: Annotated[str, Field(description="Base64; never a URL.")]


class FileData(BaseModel):
    """One of several pictures."""

    data: Annotated[str, Field(description="Base64; never a URL.")]
    name: str = ""


class ExtrasOfSeveral(Extras):
    """Body of POST /sdapi/v1/extra-batch-images."""

    files: Annotated[list[FileData], Field(alias="imageList", min_length=1, max_length=64)]


class ExtrasOfOneAnswer(BaseModel):
    """The answer to the first."""

    html_info: str
    image: str


class ExtrasOfSeveralAnswer(BaseModel):
    """The answer to the second."""

    html_info: str
    images: list[str]
