"""/sdapi/v1/txt2img and img2img: pictures as A1111's clients ask for them."""

from __future__ import annotations

import json
import random
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse

from latentrt.images.metadata import prose
from latentrt.images.picture import Picture
from latentrt.model.given import STRENGTH
from latentrt.request import HANDOFF, HIRES_STRENGTH, RESIZES, Request
from latentrt.serve.http.catalog import unknown
from latentrt.serve.http.errors import Problem, documented
from latentrt.serve.http.generation import Context, all_pictures, generating
from latentrt.serve.http.images import File, Files, ToMask, base64_file, encode, in_thread, shape_of, white_mask
from latentrt.serve.http.models.models import models_of, serving
from latentrt.serve.http.sdapi.answers import Error
from latentrt.serve.http.sdapi.controlnet import add_ons_of
from latentrt.serve.http.sdapi.fields import renamed
from latentrt.serve.http.sdapi.options import FORMATS, Options, check_idle, options_of
from latentrt.serve.http.sdapi.samplers import solver_of
from latentrt.serve.http.sdapi.schema import (
    DENOISING_STRENGTH,
    FILLS,
    IMAGE_CFG_SCALE,
    MASK_BLUR,
    Images,
    ImageToImage,
    TextToImage,
)
from latentrt.serve.http.utf8 import Utf8Response

router = APIRouter()
DRAWN = documented(400, 401, 404, 408, 409, 413, 415, 422, 429, 500, 503, 504, model=Error)
API = "sdapi"
PREVIEWS = 3  # of a picture whose client can ask after it by its task
UPSCALERS = ("Latent",)  # of hires fix


@router.post("/txt2img", responses={200: {"model": Images}, **DRAWN}, response_class=JSONResponse)
async def txt2img(wanted: TextToImage, http: HttpRequest) -> JSONResponse:
    """Draw pictures from a prompt."""
    options = options_of(wanted.override_settings)
    context = await _served(http, wanted, options)
    return await _answer(context, http, wanted, options, {}, context.catalog.sizes.own)


@router.post("/img2img", responses={200: {"model": Images}, **DRAWN}, response_class=JSONResponse)
async def img2img(wanted: ImageToImage, http: HttpRequest) -> JSONResponse:
    """Draw pictures from a prompt and a picture; with a mask only where it is white.

    Models that enlarge pictures draw each so many times as large as it is, unless a width and height are given.
    """
    options = options_of(wanted.override_settings)
    context = await _served(http, wanted, options)
    catalog = context.catalog
    files = {"image": file_of(context, "init_images", wanted.init_images[0])}
    if wanted.mask:
        to_mask = partial(white_mask, inverted=bool(wanted.inpainting_mask_invert))
        files["mask"] = file_of(context, "mask", wanted.mask, to_mask)
    size = catalog.sizes.own
    if catalog.enlarges > 1 and not (wanted.width or wanted.height):
        shape = await in_thread(partial(shape_of, files["image"], context.settings.max_image_pixels))
        with renamed():
            size = catalog.sizes.fitting(*shape)
    more = {"strength": _strength(context, wanted), "image_guidance": _image_guidance(context, wanted)}
    used = {**_mask(wanted), **_resize(context, wanted)}
    return await _answer(context, http, wanted, options, files, size, **more, **used, noise_level=wanted.noise_level)


async def _served(http: HttpRequest, wanted: TextToImage, options: Options) -> Context:
    """Return the parts of the model that a request names, or that its client has chosen, loaded."""
    models, owner = models_of(http), http.state.facts["owner"]
    with renamed():
        name = options.sd_model_checkpoint or models.chosen(owner).name
        pictures = (wanted.batch_size or 1) * (wanted.n_iter or 1)
        context = await serving(http, name, pictures=pictures)
    if (wanted.model_extra or {}).get("override_settings_restore_afterwards") is False:
        models.choose(owner, name)
    return context


def file_of(context: Context, name: str, text: str, to_mask: ToMask | None = None) -> File:
    """Return a picture that came as base64, within the server's limit."""
    return base64_file(name, text, context.settings.max_image_bytes, to_mask)


def _strength(context: Context, wanted: ImageToImage) -> float | None:
    """Return the strength of an edit; none where the model begins on noise: see `schema`. Raise Problem."""
    asked = wanted.denoising_strength
    if not context.catalog.shows_picture:
        return asked or STRENGTH
    if asked not in (None, DENOISING_STRENGTH, 1):
        found = f"denoising_strength is {asked:g}, and the model draws anew beside the given picture"
        raise Problem(found, needed="1, or none", fix="leave it out", param="denoising_strength")
    return None


def _image_guidance(context: Context, wanted: ImageToImage) -> float | None:
    """Return the scale of the picture's own guidance, if it is set: see `schema`. Raise Problem."""
    asked = None if wanted.image_cfg_scale == IMAGE_CFG_SCALE else wanted.image_cfg_scale
    if asked is not None and "image_guidance" not in context.catalog.fields:
        found, needed = f"image_cfg_scale is {asked:g}", f"none: {context.catalog.name} reads none"
        raise Problem(found, needed, fix="leave it out", param="image_cfg_scale")
    return asked


def _resize(context: Context, wanted: ImageToImage) -> dict[str, str]:
    """Return the request's field for how the picture is resized. Raise Problem where that cannot be.

    A mask's surroundings that are drawn alone fill the size in any mode.
    """
    mode = wanted.resize_mode or 0
    if mode == len(RESIZES):
        raise Problem(
            f"resize_mode is {mode}", needed=f"0 to {mode - 1}", fix="resize the picture", param="resize_mode"
        )
    if mode and context.catalog.enlarges > 1:
        needed = "0: the model enlarges pictures as they are"
        raise Problem(f"resize_mode is {mode}", needed, fix="leave it out", param="resize_mode")
    return {} if wanted.mask and wanted.inpaint_full_res is not False else {"resize": RESIZES[mode]}


def _mask(wanted: ImageToImage) -> dict[str, Any]:
    """Return the request's fields for how its mask is used, with A1111's defaults; without a mask none.

    Raises:
        Problem: the mask's edge is to be softer in one direction.
    """
    if not wanted.mask:
        return {}
    usual = MASK_BLUR if wanted.mask_blur is None else wanted.mask_blur
    across, down = (usual if one is None else one for one in (wanted.mask_blur_x, wanted.mask_blur_y))
    if across != down:
        found = f"mask_blur_x is {across:g}, and mask_blur_y {down:g}"
        raise Problem(found, needed="the same", fix="send mask_blur alone", param="mask_blur_x")
    crop = (wanted.inpaint_full_res_padding or 0) if wanted.inpaint_full_res is not False else None
    return {"mask_blur": across, "mask_crop": crop, "mask_fill": FILLS[wanted.inpainting_fill or 0], "mask_keeps": True}


async def _answer(
    context: Context,
    http: HttpRequest,
    wanted: TextToImage,
    options: Options,
    files: Files,
    size: tuple[int, int],
    **more: Any,
) -> JSONResponse:
    extra = (wanted.model_extra or {}).items()
    check_idle({name: value for name, value in extra if wanted.enable_hr or not name.startswith("hr_")})
    solver, settings = solver_of(context.catalog, wanted, options)
    previews = PREVIEWS if wanted.force_task_id else 0
    encoding = partial(encode, kind=FORMATS[(options.samples_format or "png").lower()])
    more |= add_ons_of(wanted.alwayson_scripts, context.catalog, files.get("image"), context.settings.max_image_bytes)
    with renamed():
        request = _request(context, wanted, options, size, solver, options=settings, **more)
        async with generating(
            context, http, request, files, api=API, previews=previews, task=wanted.force_task_id
        ) as handle:
            drawn = await all_pictures(http, handle, encoding)
    parameters = wanted.model_dump(include=set(TextToImage.model_fields))
    images = [file for _, file in drawn] if wanted.send_images is not False else []
    info = _info(request, [picture for picture, _ in drawn])
    info |= {"sd_model_name": context.catalog.name}
    info |= {"sampler_name": wanted.sampler_name} if wanted.sampler_name else {}
    info |= {"warnings": handle.warnings} if handle.warnings else {}
    return Utf8Response({"images": images, "parameters": parameters, "info": json.dumps(info)})


def _request(
    context: Context, wanted: TextToImage, told: Options, size: tuple[int, int], solver: str | None, **more: Any
) -> Request:
    catalog = context.catalog
    layers = told.CLIP_stop_at_last_layers or 1  # counts the last one too; diffusers those that are left out
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
        clip_skip=layers - 1 or None,
        seed_delta=told.eta_noise_seed_delta or None,
        **more,
        **_variation(wanted),
        **_stages(context, wanted),
    )


def _variation(wanted: TextToImage) -> dict[str, Any]:
    """Return the request's fields for variations, if there are to be some."""
    if not wanted.subseed_strength:
        return {}
    subseed = random.randrange(2**31) if wanted.subseed in (None, -1) else wanted.subseed
    return {"subseed": subseed, "subseed_strength": wanted.subseed_strength}


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
        "subseed": facts[0].get("subseed", request.seed),
        "all_subseeds": [one.get("subseed", one["seed"]) for one in facts],
        "subseed_strength": request.subseed_strength,
        "width": request.width,
        "height": request.height,
        "sampler_name": facts[0]["solver"],
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": request.count,
        "denoising_strength": request.strength,
        "infotexts": [prose(one, picture.size) for one, picture in zip(facts, drawn, strict=True)],
        "index_of_first_image": 0,
        "clip_skip": (request.clip_skip or 0) + 1,
        "extra_generation_params": {**request.options},
    }
