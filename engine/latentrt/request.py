"""A user's request, and how it is made of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentrt.adapters.given import strengths_of
from latentrt.errors import RequestError
from latentrt.guides import Control, ImagePrompt
from latentrt.sampling.settings import KNOWN_KEYS
from latentrt.sampling.solvers import SOLVERS
from latentrt.values import check_number, did_you_mean, is_text, is_whole, plain

MAX_SEED = 2**64 - 1
PICTURES = ("image", "mask", "depth")  # what a picture may be used for
SYNTAXES = ("plain", "a1111", "compel")  # of prompts
RESIZES = ("stretch", "crop", "fill")  # of pictures to a run's size
FILLS = ("original", "fill", "noise", "nothing")  # of what a mask repaints
HIRES_STRENGTH = 0.7
HANDOFF = 0.8  # of a run with a refiner, where nothing else is said

_WHOLE = {"steps": 10_000, "hires_steps": 10_000, "height": 65_536, "width": 65_536}  # from 1 to these
_CHOICES = {"prompt_syntax": SYNTAXES, "mask_fill": FILLS, "mask_keeps": (False, True), "resize": RESIZES}
_NUMBERS = {
    "guidance": (0.0, 1e6),
    **dict.fromkeys(("guidance_rescale", "strength", "hires_strength", "handoff"), (0.0, 1.0)),
    "hires_scale": (1.0, 8.0),
    "image_guidance": (1.0, 1e6),
    **dict.fromkeys(("aesthetic_score", "negative_aesthetic_score"), (0.0, 1000.0)),
    "mask_blur": (0.0, 256.0),
    "subseed_strength": (0.0, 1.0),
}

# What users of other tools type, and the name of it here.
_OTHER_NAMES = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "image_guidance_scale": "image_guidance",
    "num_images_per_prompt": "count",
    "schedule": "solver",
    "scheduler": "solver",
    "sampler": "solver",
    "negative": "negative_prompt",
    "init_image": "image",
    "mask_image": "mask",
    "denoising_strength": "strength",
    "loras": "lora",
    "lora_scale": "lora",
    "cross_attention_kwargs": "lora",
    "control_image": "control",
    "controlnet_conditioning_scale": "control",
    "control_guidance_start": "control",
    "control_guidance_end": "control",
    "guess_mode": "control",
    "ip_adapter_image": "ip_adapter",
    "ip_adapter_scale": "ip_adapter",
    "prompt": "",
    "options": "",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One picture, or `count` of them, as a user asks for it. numpy's numbers and texts become Python's.

    Attributes:
        prompt: what to draw; None for models that read no prompt.
        negative_prompt: what to keep out. None is the model's own: empty text or zeros, as in its training.
        steps: of the solver; None is the model's default.
        solver: a name of `latentrt solvers`; None is the class that the bundle's scheduler_config.json names.
        seed: of the first picture. Picture i has seed + i, so a picture never depends on its siblings.
        guidance: scale of classifier-free guidance: 1 or less runs one lane, above 1 two; None is the model's default.
            Models that read it (LCM) run one lane at any scale.
        guidance_rescale: 0 to 1, see `Guidance`.
        guidance_interval: the part of the run, as fractions of its rows, in which guidance acts.
        image_guidance: how closely pictures stay to the given one, 1 or more, of models that edit it as the prompt says
            (InstructPix2Pix); None is 1.5. It acts with `guidance`, in three lanes.
        cache_interval: 1 computes every row in full; N, only every Nth: rows between use deep features again
            (DeepCache), which is faster and changes the picture.
        height, width: in pixels; None is the size that the model was trained at.
        count: how many pictures.
        class_label: the number of a class, for models that were trained with classes.
        noise_level: how much noise a model that enlarges pictures adds to the given one, a timestep; None is 20.
        aesthetic_score, negative_aesthetic_score: how good a picture SDXL's refiner is told to draw, and what to keep
            away from; None is 6 and 2.5.
        prompt_syntax: how prompts are read (docs/prompts.md): "plain" as they are typed, "a1111" or "compel" with
            weights.
        clip_skip: layers of the text encoders to leave out at the end, as diffusers counts; None and 0 are none.
        embeddings: files of textual inversion (.safetensors) by the words of the prompt that stand for them.
        lora: how much of each of the engine's LoRAs is added, by name: 0.8, or (0.8, 0.5) of the UNet and of the text
            encoders.
        noise: the torch generator whose numbers the seed selects.
        strength: how much of the run is made on a given picture, above 0 to 1; None is 0.8, or 1 with a mask.
        mask_blur: how soft the mask's edge is: the sigma of a Gaussian blur, in pixels of the given picture.
        mask_crop: draw the mask's surroundings alone, with so many pixels of padding, at the request's size, and put
            them back into the picture ("only masked"); None: draw all of it.
        mask_fill: what the run begins on where it repaints: the "original", a "fill" of the colours around, the run's
            own "noise", or "nothing" (zeros); with a strength of 1 it begins on noise anyway.
        mask_keeps: give back the picture's own pixels where it is not repainted, not what the VAE makes of them; always
            so with mask_blur or mask_crop.
        resize: how a given picture and its mask are brought to the run's size: "stretch", or with their proportions
            kept "crop" (its middle) or "fill" (all of it; its edges go on at two sides).
        subseed, subseed_strength: variations: the first noise lies between that of the seed and that of subseed + i,
            at a strength above 0; then all pictures have the seed itself.
        seed_delta: rows draw the noise that they add from seed + seed_delta; 0: they go on where the first noise ended.
        pictures: the request's pictures by use: "image" to begin on, "mask" for what of it to repaint, "depth" for its
            depth map. PIL images, or uint8 or uint16 arrays.
        control: the pictures that the engine's ControlNets follow, by the ControlNets' names; with settings as a
            `Control` or a mapping of its fields.
        ip_adapter: the pictures that the engine's IP-Adapters show the model, by the IP-Adapters' names; with settings
            as an `ImagePrompt` or a mapping of its fields.
        hires_scale: by how much the finished latents are enlarged, 1 to 8, to be drawn on (hires fix); None: not.
        hires_steps: of the second run; None is as many as of the first.
        hires_strength: how much of the second run is made, above 0 to 1.
        handoff: the part of the run, 0 to 1, after which the engine's refiner takes over; None: it does not.
        options: settings of the solver: eta, use_karras_sigmas, timestep_spacing, ...

    Raises:
        RequestError: a value is out of range.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = None
    solver: str | None = None
    seed: int = 0
    guidance: float | None = None
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    image_guidance: float | None = None
    cache_interval: int = 1
    height: int | None = None
    width: int | None = None
    count: int = 1
    class_label: int | None = None
    noise_level: int | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    prompt_syntax: str = "plain"
    clip_skip: int | None = None
    embeddings: Mapping[str, str | Path] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)
    noise: str = "torch-cpu"
    strength: float | None = None
    mask_blur: float = 0.0
    mask_crop: int | None = None
    mask_fill: str = "original"
    mask_keeps: bool = False
    resize: str = "stretch"
    subseed: int = 0
    subseed_strength: float = 0.0
    seed_delta: int = 0
    pictures: Mapping[str, Any] = field(default_factory=dict)
    control: Mapping[str, Any] = field(default_factory=dict)
    ip_adapter: Mapping[str, Any] = field(default_factory=dict)
    hires_scale: float | None = None
    hires_steps: int | None = None
    hires_strength: float = HIRES_STRENGTH
    handoff: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mappings = {"pictures", "control", "ip_adapter", "options", "embeddings", "lora"}
        for name in set(self.__dataclass_fields__) - mappings:
            object.__setattr__(self, name, plain(getattr(self, name)))
        _whole("count", self.count, 1, 10_000)
        _whole("cache_interval", self.cache_interval, 1, 10_000)
        for name in ("seed", "subseed"):
            _whole(name, getattr(self, name), 0, MAX_SEED)
            last = getattr(self, name) + self.count - 1
            _whole(f"the last picture's {name} ({name} + count - 1)", last, 0, MAX_SEED)
        for name, largest in _WHOLE.items():
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, largest)
        for name in ("class_label", "noise_level"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 0, 2**31 - 1)
        if self.clip_skip is not None:
            _whole("clip_skip", self.clip_skip, 0, 1000)
        if self.mask_crop is not None:
            _whole("mask_crop", self.mask_crop, 0, 65_536)
        _whole("seed_delta", self.seed_delta, 0, MAX_SEED)
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                found, needed = f"{name} is {getattr(self, name)!r}", f"one of {', '.join(map(str, known))}"
                raise RequestError(found, needed=needed)
        _check_embeddings(self.embeddings)
        object.__setattr__(self, "lora", strengths_of(self.lora))
        for name, optional in (("prompt", True), ("negative_prompt", True), ("solver", True), ("noise", False)):
            value = getattr(self, name)
            if not isinstance(value, str) and not (optional and value is None):
                raise RequestError(f"{name} is {value!r}", needed="text or None" if optional else "text")
        for name, (low, high) in _NUMBERS.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), low, high)
        interval = self.guidance_interval
        if not isinstance(interval, (list, tuple)) or len(interval) != 2:
            raise RequestError(
                f"guidance_interval is {interval!r}",
                needed="two numbers: start and end",
                fix="pass (0.0, 1.0) for the whole run",
            )
        check_number("guidance_interval's start", interval[0], 0.0, 1.0)
        check_number("guidance_interval's end", interval[1], interval[0], 1.0)
        if unknown := sorted(set(self.pictures) - set(PICTURES)):
            raise RequestError(f"there is a picture for {unknown[0]!r}", needed=f"one for {' or '.join(PICTURES)}")
        for name, what, kind in (("control", "ControlNets", Control), ("ip_adapter", "IP-Adapters", ImagePrompt)):
            own = getattr(self, name)
            if not isinstance(own, Mapping):
                found, fix = f"{name} is a {type(own).__name__}", f'pass {name}={{"NAME": picture}}'
                raise RequestError(found, needed=f"pictures by the names of {what}", fix=fix)
            object.__setattr__(self, name, {key: kind.of(value) for key, value in own.items()})
        _check_options(self.options)
        object.__setattr__(self, "options", {key: plain(value) for key, value in self.options.items()})

    @property
    def keeps_pixels(self) -> bool:
        """Whether the given picture's own pixels are given back where it is not repainted."""
        return self.mask_keeps or self.mask_blur > 0 or self.mask_crop is not None

    @property
    def masked(self) -> bool:
        """Whether it says how a mask is to be used."""
        return self.keeps_pixels or self.mask_fill != "original"


def _check_embeddings(files: object) -> None:
    pairs = files.items() if isinstance(files, Mapping) else [(None, None)]
    if not all(is_text(token) and isinstance(path, (str, Path)) for token, path in pairs):
        raise RequestError(
            f"embeddings is {files!r}", needed="files by token", fix='pass embeddings={"<toy>": "toy.safetensors"}'
        )


def _check_options(options: object) -> None:
    """Refuse options that have a field of their own, or belong to a call: options are the solver's alone."""
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise RequestError(f"options is {options!r}", needed="names with their values", fix="pass options={'eta': 0.5}")
    taken = sorted({*Request.__dataclass_fields__, "schedule", "scheduler", "self"} & set(options))
    if taken:
        raise RequestError(
            f"{taken[0]!r} is given as an option",
            needed="a solver's own settings, such as eta",
            fix=f"leave {taken[0]} out of them",
        )


def _whole(name: str, value: object, low: int, high: int) -> None:
    if not is_whole(value) or not low <= value <= high:  # type: ignore[operator]
        raise RequestError(f"{name} is {value!r}", needed=f"a whole number from {low} to {high}")


def request_from(prompt: str | None, settings: Mapping[str, Any]) -> Request:
    """Return a Request; settings other than its own fields become the solver's options.

    Raises:
        RequestError: a setting that neither a Request nor any solver has, or a value out of range.
    """
    own = set(Request.__dataclass_fields__) - {"prompt", "pictures", "options"}
    known = {*own, *KNOWN_KEYS, *(key for solver in SOLVERS.values() for key in solver.arguments)}
    for key in settings:
        if key not in known:
            fix = did_you_mean(key, known, "leave it out")
            if key in _OTHER_NAMES:
                fix = f"did you mean {_OTHER_NAMES[key]}?" if _OTHER_NAMES[key] else "leave it out"
            raise RequestError(
                f"{key!r} is not an option", needed="a field of Request or a setting of a solver", fix=fix
            )
    fields = {key: value for key, value in settings.items() if key in own}
    options = {key: value for key, value in settings.items() if key not in own}
    return Request(prompt=prompt, **fields, options=options)
