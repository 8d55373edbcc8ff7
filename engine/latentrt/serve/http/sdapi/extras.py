"""/sdapi/v1/extra-single-image and extra-batch-images, which enlarge pictures; png-info, which reads their texts.

Pillow enlarges by Lanczos' filter or by repeating pixels; so does a served model that enlarges, under its own name.
"""

from __future__ import annotations

import html
from functools import partial
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from PIL import Image
from PIL.PngImagePlugin import PngInfo as PngTexts

from latentrt.images.metadata import read_prose, texts_of
from latentrt.serve.http.catalog import Catalog, unknown
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.generation import Chosen, Context, generating
from latentrt.serve.http.images import File, encode, in_thread, loaded
from latentrt.serve.http.models.models import serving
from latentrt.serve.http.sdapi.drawing import API, DRAWN, file_of
from latentrt.serve.http.sdapi.fields import renamed
from latentrt.serve.http.sdapi.schema import (
    Extras,
    ExtrasOfOne,
    ExtrasOfOneAnswer,
    ExtrasOfSeveral,
    ExtrasOfSeveralAnswer,
    PngInfo,
    PngInfoAnswer,
)

router = APIRouter()
NONE = "None"
_FILTERS = {"Lanczos": Image.Resampling.LANCZOS, "Nearest": Image.Resampling.NEAREST}
_STEP = 8  # of the sides, as A1111 has it


def upscalers_of(catalog: Catalog) -> dict[str, float]:
    """Return what enlarges pictures, with the factor of a model."""
    own = {catalog.name: float(catalog.enlarges)} if catalog.enlarges > 1 else {}
    return {**dict.fromkeys((NONE, *_FILTERS), 1.0), **own}


@router.post("/extra-single-image", responses=DRAWN)
async def extra_single_image(wanted: ExtrasOfOne, http: HttpRequest, context: Chosen) -> ExtrasOfOneAnswer:
    """Enlarge a picture."""
    _check(context, wanted)
    file, told, _ = await _enlarged(context, http, wanted, file_of(context, "image", wanted.image))
    return ExtrasOfOneAnswer(html_info=told, image=file)


@router.post("/extra-batch-images", responses=DRAWN)
async def extra_batch_images(wanted: ExtrasOfSeveral, http: HttpRequest, context: Chosen) -> ExtrasOfSeveralAnswer:
    """Enlarge several pictures, one after the other; together they may have as many pixels as one."""
    _check(context, wanted)
    files = [file_of(context, "imageList", one.data) for one in wanted.files]
    images, told, pixels = list[str](), "", 0
    for file in files:
        image, told, more = await _enlarged(context, http, wanted, file, pixels)
        images, pixels = [*images, image], pixels + more
    return ExtrasOfSeveralAnswer(html_info=told, images=images)


@router.post("/png-info", responses=DRAWN)
async def png_info(wanted: PngInfo, context: Chosen) -> PngInfoAnswer:
    """Read what a picture's file says of how it was made."""
    file = file_of(context, "image", wanted.image.strip())
    image = await in_thread(partial(loaded, file, context.settings.max_image_pixels, deep=True))
    texts = texts_of(image)
    info = texts.pop("parameters", "")
    return PngInfoAnswer(info=info, items=texts, parameters=read_prose(info) if info else {})


def _check(context: Context, wanted: Extras) -> None:
    """Refuse what is not offered. Raise Problem."""
    for name in ("gfpgan_visibility", "codeformer_visibility"):
        if getattr(wanted, name):
            raise Problem(f"{name} is set", needed="0: no faces are restored here", fix="leave it out", param=name)
    known = upscalers_of(context.catalog)
    for name in ("upscaler_1", "upscaler_2"):
        if getattr(wanted, name) not in known:
            raise unknown(name, getattr(wanted, name), known)


async def _enlarged(
    context: Context, http: HttpRequest, wanted: Extras, file: File, before: int = 0
) -> tuple[str, str, int]:
    """Return the enlarged picture as base64, what was done, as HTML, and its pixels.

    Raises:
        Problem: with the pixels of those before it, there would be too many.
    """
    most = context.settings.max_image_pixels
    given = await in_thread(partial(loaded, file, most, deep=True))
    texts, picture = texts_of(given), await in_thread(partial(loaded, file, most))
    picture = picture.convert("RGB")
    size, crop = _sizes(wanted, picture.size)
    if max(size[0] * size[1], crop[0] * crop[1]) + before > most:
        found, param = f"the picture would have {size[0]}x{size[1]} pixels", "upscaling_resize"
        raise Problem(found, needed=f"at most {most} in all", fix="enlarge it by less", param=param)
    told: dict[str, Any] = {}
    if wanted.upscaler_1 != NONE:
        made = await _by(http, wanted.upscaler_1, picture, file, size)
        told = {"Postprocess upscale": f"{size[0]}x{size[1]}", "Postprocess upscaler": wanted.upscaler_1}
        if wanted.upscaler_2 != NONE and wanted.extras_upscaler_2_visibility:
            second = await _by(http, wanted.upscaler_2, picture, file, size)
            made = Image.blend(made, second, wanted.extras_upscaler_2_visibility)
            told |= {"Postprocess upscaler 2": wanted.upscaler_2}
        picture = made if crop == size else _cropped(made, crop)
    text = ", ".join(f"{name}: {value}" for name, value in told.items())
    made_file = await in_thread(partial(_file, picture, {**texts, "postprocessing": text}))
    return made_file, f"<p>{html.escape(text)}</p>", picture.width * picture.height


def _sizes(wanted: Extras, own: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return width and height of the enlarged picture, and what it is cropped to."""
    width, height = own
    target = (wanted.upscaling_resize_w, wanted.upscaling_resize_h)
    by = wanted.upscaling_resize
    if wanted.resize_mode == 1:
        by = max(target[0] / width, target[1] / height)
    size = (max(_STEP, int(width * by) // _STEP * _STEP), max(_STEP, int(height * by) // _STEP * _STEP))
    return size, target if wanted.resize_mode == 1 and wanted.upscaling_crop else size


async def _by(http: HttpRequest, name: str, picture: Image.Image, file: File, size: tuple[int, int]) -> Image.Image:
    """Return a picture at a size, by one of the upscalers."""
    if name in _FILTERS:
        return await in_thread(partial(picture.resize, size, _FILTERS[name]))
    context = await serving(http, name)
    catalog = context.catalog
    with renamed():
        request = catalog.request(
            "",
            negative_prompt=None,
            n=1,
            size=catalog.sizes.fitting(*picture.size),
            steps=None,
            guidance=None,
            scheduler=None,
            seed=None,
            class_label=None,
        )
        async with generating(context, http, request, {"image": file}, api=API) as handle:
            (drawn,) = await handle.pictures()
    return await in_thread(partial(drawn.convert("RGB").resize, size, _FILTERS["Lanczos"]))


def _cropped(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Return the middle of a picture, on black where it is smaller."""
    made = Image.new("RGB", size)
    made.paste(picture, (size[0] // 2 - picture.width // 2, size[1] // 2 - picture.height // 2))
    return made


def _file(picture: Image.Image, texts: dict[str, str]) -> str:
    """Return a picture as base64 of a PNG file with these texts."""
    info = PngTexts()
    for name, text in texts.items():
        if text and name != "XML:com.adobe.xmp":
            info.add_itxt(name, text)
    return encode(picture, "png", pnginfo=info)
