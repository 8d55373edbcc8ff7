"""/sdapi/v1: enough of A1111's API for its clients."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from latentrt.images.metadata import prose
from latentrt.images.picture import Picture
from latentrt.model.given import STRENGTH
from latentrt.request import HANDOFF, HIRES_STRENGTH, Request
from latentrt.sampling.solvers import SOLVERS
from latentrt.serve.core.handle import Handle
from latentrt.serve.http.catalog import unknown
from latentrt.serve.http.errors import Problem, documented
from latentrt.serve.http.generation import Context, Served, all_pictures, generating
from latentrt.serve.http.images import File, Files, encode, from_base64, in_thread, shape_of, white_mask
from latentrt.serve.http.sd_schema import (
    DENOISING_STRENGTH,
    IDLE,
    IMAGE_CFG_SCALE,
    SAMPLERS,
    SCHEDULERS,
    UPSCALERS,
    Checkpoint,
    Images,
    ImageToImage,
    LoraFile,
    ProgressReport,
    Sampler,
    Scheduler,
    State,
    TextToImage,
)
from latentrt.values import is_whole

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], responses=documented(401))
_DRAWN = {200: {"model": Images}, **documented(400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)}
API = "sdapi"
MOST_LAYERS = 12  # of CLIP_stop_at_last_layers
PREVIEWS = 3  # of a picture whose client can ask after it by its task
# Fields that the catalog calls by OpenAI's names.
_NAMES = {
    "n": "batch_size",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "size": "width",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
    "hires_scale": "hr_scale",
    "hires_steps": "hr_second_pass_steps",
    "handoff": "refiner_switch_at",
    "model": "sd_model_checkpoint",
    "image": "init_images",
}


@router.get("/options")
async def options(context: Served) -> dict[str, Any]:
    """The few that clients read."""
    return {"sd_model_checkpoint": context.catalog.name, "sd_checkpoint_hash": "", "samples_format": "png"}


@router.post("/options", responses=documented(400, 404, 415))
async def set_options(values: dict[str, Any], context: Served) -> None:
    """Clients write all options back to choose a checkpoint; there is one, and nothing else to set."""
    context.catalog.check_model(str(values.get("sd_model_checkpoint") or ""))


@router.get("/sd-models")
async def sd_models(context: Served) -> list[Checkpoint]:
    """The model under its own name."""
    name = context.catalog.name
    return [Checkpoint(title=name, model_name=name, filename=name)]


@router.get("/loras")
async def loras(context: Served) -> list[LoraFile]:
    """The LoRAs that prompts may have, as <lora:name:0.8>."""
    names = await in_thread(lambda: context.catalog.loras)
    return [LoraFile(name=name, alias=name, path=path.name) for name, path in names.items()]


@router.post("/refresh-loras")
async def refresh_loras() -> dict[str, Any]:
    """Do nothing: the folder is listed anew for each request."""
    return {}


@router.get("/samplers")
async def samplers() -> list[Sampler]:
    """By A1111's names, then by ours."""
    known = [Sampler(name=name, aliases=[ours], options={}) for name, (ours, _) in SAMPLERS.items()]
    taken = {ours for ours, _ in SAMPLERS.values()}
    return known + [Sampler(name=name, aliases=[], options={}) for name in SOLVERS if name not in taken]


@router.get("/schedulers")
async def schedulers() -> list[Scheduler]:
    """How noise levels may be spaced."""
    return [Scheduler(name=name.lower(), label=name) for name in SCHEDULERS]


@router.post("/txt2img", responses=_DRAWN, response_class=JSONResponse)
async def txt2img(wanted: TextToImage, http: HttpRequest, context: Served) -> JSONResponse:
    """Draw pictures from a prompt."""
    return await _answer(context, http, wanted, {}, context.catalog.sizes.own)


@router.post("/img2img", responses=_DRAWN, response_class=JSONResponse)
async def img2img(wanted: ImageToImage, http: HttpRequest, context: Served) -> JSONResponse:
    """Draw pictures from a prompt and a picture; with a mask only where it is white.

    Models that enlarge pictures draw each so many times as large as it is, unless a width and height are given.
    """
    catalog = context.catalog
    files = {"image": _file(context, "init_images", wanted.init_images[0])}
    if wanted.mask:
        to_mask = partial(white_mask, inverted=bool(wanted.inpainting_mask_invert))
        files["mask"] = _file(context, "mask", wanted.mask, to_mask)
    size = catalog.sizes.own
    if catalog.enlarges > 1 and not (wanted.width or wanted.height):
        shape = await in_thread(partial(shape_of, files["image"], context.settings.max_image_pixels))
        with _renamed():
            size = catalog.sizes.fitting(*shape)
    more = {"strength": _strength(context, wanted), "image_guidance": _image_guidance(context, wanted)}
    return await _answer(context, http, wanted, files, size, **more, noise_level=wanted.noise_level)


@router.get("/progress")
async def progress(
    context: Served, http: HttpRequest, id_task: str | None = None, skip_current_image: bool = False
) -> ProgressReport:
    """Of one task, or of the oldest that runs."""
    handles = _own(context, http, id_task)
    if not handles:
        return ProgressReport(progress=0.0, eta_relative=0.0, state=State())
    handle = next((handle for handle in handles if handle.started is not None), handles[0])
    image = None
    if handle.shown is not None and not skip_current_image:
        image = await in_thread(partial(encode, handle.shown))
    part, taken = handle.progress, time.monotonic() - handle.came - handle.queue_seconds
    state = State(
        job=handle.task or handle.id,
        job_count=handle.request.count,
        job_no=handle.done,
        sampling_step=handle.row,
        sampling_steps=handle.rows,
    )
    eta = taken / part * (1 - part) if part else 0.0
    return ProgressReport(progress=part, eta_relative=eta, state=state, current_image=image)


@router.post("/interrupt")
async def interrupt(context: Served, http: HttpRequest, id_task: str | None = None) -> dict[str, Any]:
    """Give up one task, or all that this key's A1111 clients have; never those of another key."""
    for handle in _own(context, http, id_task):
        context.scheduler.cancel(handle)
    return {}


def _own(context: Context, http: HttpRequest, task: str | None) -> list[Handle]:
    """Return this key's requests by this API, oldest first; those of one task, if it is given."""
    owner = http.state.facts["owner"]
    own = [handle for handle in context.scheduler.handles if (handle.api, handle.owner) == (API, owner)]
    return [handle for handle in own if task in (None, handle.task)]


def _file(context: Context, name: str, text: str, to_mask: Any = None) -> File:
    most = context.settings.max_image_bytes
    return File(name, lambda: BytesIO(from_base64(text, name, most)), to_mask)


def _strength(context: Context, wanted: ImageToImage) -> float | None:
    """Return the strength of an edit; none where the model begins on noise: see `sd_schema`. Raise Problem."""
    asked = wanted.denoising_strength
    if not context.catalog.shows_picture:
        return asked or STRENGTH
    if asked not in (None, DENOISING_STRENGTH, 1):
        found = f"denoising_strength is {asked:g}, and the model draws anew beside the given picture"
        raise Problem(found, needed="1, or none", fix="leave it out", param="denoising_strength")
    return None


def _image_guidance(context: Context, wanted: ImageToImage) -> float | None:
    """Return the scale of the picture's own guidance, if it is set: see `sd_schema`. Raise Problem."""
    asked = None if wanted.image_cfg_scale == IMAGE_CFG_SCALE else wanted.image_cfg_scale
    if asked is not None and "image_guidance" not in context.catalog.fields:
        found, needed = f"image_cfg_scale is {asked:g}", f"none: {context.catalog.name} reads none"
        raise Problem(found, needed, fix="leave it out", param="image_cfg_scale")
    return asked


async def _answer(
    context: Context, http: HttpRequest, wanted: TextToImage, files: Files, size: tuple[int, int], **more: Any
) -> JSONResponse:
    _check_idle(wanted)
    solver, options = _solver(wanted)
    previews = PREVIEWS if wanted.force_task_id else 0
    with _renamed():
        request = _request(context, wanted, solver, size, options=options, **more)
        async with generating(
            context, http, request, files, api=API, previews=previews, task=wanted.force_task_id
        ) as handle:
            drawn = await all_pictures(http, handle, encode)
    parameters = wanted.model_dump(mode="json", include=set(TextToImage.model_fields))
    images = [file for _, file in drawn] if wanted.send_images is not False else []
    info = _info(request, [picture for picture, _ in drawn])
    info |= {"sd_model_name": context.catalog.name}
    info |= {"sampler_name": wanted.sampler_name} if wanted.sampler_name else {}
    info |= {"warnings": handle.warnings} if handle.warnings else {}
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(info)})


@contextmanager
def _renamed() -> Iterator[None]:
    """Let refusals name fields as A1111's API does."""
    try:
        yield
    except Problem as problem:
        problem.param = _NAMES.get(problem.param or "", problem.param)
        raise


def _request(context: Context, wanted: TextToImage, solver: str | None, size: tuple[int, int], **more: Any) -> Request:
    catalog = context.catalog
    catalog.check_model(str((wanted.override_settings or {}).get("sd_model_checkpoint") or ""))
    return catalog.request(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        n=(wanted.batch_size or 1) * (wanted.n_iter or 1),
        size=catalog.sizes.sides(wanted.width or size[0], wanted.height or size[1]),
        steps=wanted.steps,
        guidance=wanted.cfg_scale,
        scheduler=solver,
        seed=None if wanted.seed in (None, -1) else wanted.seed,
        class_label=wanted.class_label,
        prompt_syntax="a1111" if catalog.prompted else "plain",
        clip_skip=_clip_skip(wanted),
        **more,
        **_stages(context, wanted),
    )


def _stages(context: Context, wanted: TextToImage) -> dict[str, Any]:
    """Return the request's fields for hires fix and the refiner."""
    fields: dict[str, Any] = {}
    if wanted.enable_hr:
        if wanted.hr_upscaler not in (None, "", *UPSCALERS):
            raise unknown("hr_upscaler", wanted.hr_upscaler, UPSCALERS)
        steps = wanted.hr_second_pass_steps or None
        strength = wanted.denoising_strength or HIRES_STRENGTH
        fields = {"hires_scale": wanted.hr_scale or 2.0, "hires_steps": steps, "hires_strength": strength}
    name = wanted.refiner_checkpoint
    if name and name != "None":
        known = [] if context.catalog.refiner is None else [context.catalog.refiner]
        if name not in known:
            raise unknown("refiner_checkpoint", name, known or ["None"])
        fields["handoff"] = wanted.refiner_switch_at or HANDOFF
    return fields


def _clip_skip(wanted: TextToImage) -> int | None:
    """Return diffusers' count of A1111's clip skip, which counts the last layer too. Raise Problem if it is none."""
    name = "CLIP_stop_at_last_layers"
    value = (wanted.override_settings or {}).get(name)
    if value is not None and (not is_whole(value) or not 1 <= value <= MOST_LAYERS):
        raise Problem(f"{name} is {value!r}", needed=f"a whole number from 1 to {MOST_LAYERS}", param=name)
    return value - 1 or None if value else None


def _check_idle(wanted: TextToImage) -> None:
    """Refuse fields that would need features this server does not have."""
    for name, value in {**(wanted.override_settings or {}), **(wanted.model_extra or {})}.items():
        if value is not None and value not in IDLE.get(name, (value,)):
            raise Problem(f"{name} is set", needed="what is supported here", fix=f"leave {name} out", param=name)


def _solver(wanted: TextToImage) -> tuple[str | None, dict[str, Any]]:
    """Return our solver and its settings for A1111's sampler and scheduler."""
    name = wanted.sampler_name or wanted.sampler_index
    spacing = wanted.scheduler or "Automatic"
    labels = {label.lower(): label for label in SCHEDULERS}
    if spacing.lower() not in labels:
        raise unknown("scheduler", spacing, SCHEDULERS)
    spacing = labels[spacing.lower()]
    if name and name.endswith(" Karras"):  # as it was written before A1111 1.9
        name, spacing = name.removesuffix(" Karras"), "Karras"
    usual = ""
    if name in SAMPLERS:
        name, usual = SAMPLERS[name]
    settings = dict(SCHEDULERS[usual if spacing == "Automatic" and usual else spacing])
    if wanted.eta is not None and name in SOLVERS and "eta" in SOLVERS[name].arguments:
        settings["eta"] = wanted.eta
    return name, settings


def _info(request: Request, drawn: list[Picture]) -> dict[str, Any]:
    """Return how each picture was made, in the form that A1111's clients parse."""
    facts = [picture.info["latentrt"] for picture in drawn]
    seeds = [one["seed"] for one in facts]
    prompt, negative = request.prompt or "", request.negative_prompt or ""
    return {
        "prompt": prompt,
        "all_prompts": [prompt] * len(drawn),
        "negative_prompt": negative,
        "all_negative_prompts": [negative] * len(drawn),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": request.width,
        "height": request.height,
        "sampler_name": facts[0]["solver"],
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": request.count,
        "denoising_strength": request.strength,
        "infotexts": [prose(one, picture.size) for one, picture in zip(facts, drawn, strict=True)],
        "index_of_first_image": 0,
        "extra_generation_params": {},
    }
