"""ControlNets as A1111's extension has them: units in `alwayson_scripts`, and what there is to choose from.

A preprocessor ("module") works at the size of the picture that is drawn ("pixel perfect"), whatever the client says.

Source: Mikubill/sd-webui-controlnet, its wiki's page on the API, 1.1.455; what webuiapi 0.9.17 sends.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any

from fastapi import APIRouter
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from latentrt.images.given import WHITE
from latentrt.images.hints import blurred, edges, inverted
from latentrt.request import Control
from latentrt.serve.http.catalog import Catalog, unknown
from latentrt.serve.http.controls import MOST, Sent, check_name
from latentrt.serve.http.errors import Problem, answer_to_validation
from latentrt.serve.http.generation import Chosen
from latentrt.serve.http.images import File, base64_file

router = APIRouter(prefix="/controlnet", tags=["A1111"])
SCRIPT = "controlnet"
RESIZING: tuple[tuple[str, ...], ...] = (  # by resize_mode
    ("Just Resize",),
    ("Crop and Resize", "Scale to Fit (Inner Fit)"),
    ("Resize and Fill", "Envelope (Outer Fit)"),
)
BALANCED, PROMPT, CONTROL = "Balanced", "My prompt is more important", "ControlNet is more important"
MODES = (BALANCED, PROMPT, CONTROL)  # by control_mode


class Unit(BaseModel):
    """A ControlNet in a request. Fields that change no picture here are ignored."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    enabled: bool = True
    image: str | dict[str, str | None] | None = None
    input_image: str | None = None
    mask: str | None = None
    module: str | None = "none"
    model: str | None = "None"
    weight: Annotated[float, Field(ge=0, le=MOST)] = 1.0
    resize_mode: int | str = 1
    threshold_a: float = -1
    threshold_b: float = -1
    guidance_start: Annotated[float, Field(ge=0, le=1)] = 0.0
    guidance_end: Annotated[float, Field(ge=0, le=1)] = 1.0
    control_mode: int | str = 0
    hr_option: str = "Both"


def _value(given: float, usual: float) -> float:
    return usual if given < 0 else given


def _canny(picture: Image.Image, unit: Unit) -> Image.Image:
    return edges(picture, *sorted((_value(unit.threshold_a, 100), _value(unit.threshold_b, 200))))


def _tile(picture: Image.Image, unit: Unit) -> Image.Image:
    rate = max(_value(unit.threshold_a, 1), 1)
    small = max(round(picture.width / rate), 1), max(round(picture.height / rate), 1)
    return picture.resize(small, Image.Resampling.BOX).resize(picture.size, Image.Resampling.LANCZOS)


MODULES: Mapping[str, Callable[[Image.Image, Unit], Image.Image]] = {
    "none": lambda picture, unit: picture,
    "canny": _canny,
    "invert": lambda picture, unit: inverted(picture),
    "tile_resample": _tile,
    "blur_gaussian": lambda picture, unit: blurred(picture, _value(unit.threshold_a, 9)),
    "threshold": lambda picture, unit: picture.convert("L").point(
        lambda level: 255 * (level > _value(unit.threshold_a, WHITE - 1))
    ),
}
OTHERS = {"invert (from white bg & black line)": "invert", "": "none"}  # names of some of them


def controls_of(
    scripts: Mapping[str, Any] | None, catalog: Catalog, given: File | None, most: int
) -> dict[str, Control]:
    """Return the controls of a request.

    Args:
        scripts: its `alwayson_scripts`.
        catalog: of the server.
        given: the picture that it begins on, for units without one.
        most: bytes of a picture.

    Raises:
        Problem: a script that is not here, a unit that is none, or one that asks for what is not done.
        RequestError: a unit's start is after its end.
    """
    found: dict[str, Control] = {}
    for name, script in (scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if arguments and name.lower() != SCRIPT:
            raise Problem(f"there is a script {name[:100]!r}", needed="controlnet, or none", param="alwayson_scripts")
        for number, unit in enumerate(arguments or ()):
            one = _parsed(unit, f"alwayson_scripts.{name}.args.{number}")
            if one.enabled:
                found |= _control(one, catalog, given, most, found)
    return found


def _parsed(unit: Any, place: str) -> Unit:
    try:
        return Unit.model_validate(unit)
    except ValidationError as error:
        answer = answer_to_validation(error.errors())
        raise Problem(f"{place}: {answer.body['error']['message']}", needed="a unit", param=place) from error


def _control(
    unit: Unit, catalog: Catalog, given: File | None, most: int, known: Mapping[str, Control]
) -> dict[str, Control]:
    name = (unit.model or "None").partition(" [")[0]
    check_name("model", name, catalog)
    if name in known:
        raise Problem(f"two units have the model {name}", needed="one", fix="leave one out", param="model")
    module = OTHERS.get((unit.module or "none").lower(), (unit.module or "none").lower())
    if module not in MODULES:
        raise unknown("module", module, MODULES)
    mode = _chosen("control_mode", unit.control_mode, [(name,) for name in MODES])
    if MODES[mode] == PROMPT:
        raise Problem(f"control_mode is {PROMPT!r}", needed=f"{BALANCED} or {CONTROL}", param="control_mode")
    if unit.mask:
        raise Problem("a unit has a mask", needed="none", fix="leave it out", param="mask")
    if unit.hr_option != "Both":
        raise Problem(f"hr_option is {unit.hr_option[:100]!r}", needed="Both", param="hr_option")
    fit = partial(_fitted, unit=unit, module=module, mode=_chosen("resize_mode", unit.resize_mode, RESIZING))
    scale, start, end, guess = unit.weight, unit.guidance_start, unit.guidance_end, MODES[mode] == CONTROL
    return {name: Control(Sent(_file(unit, given, most), fit), scale=scale, start=start, end=end, guess=guess)}


def _file(unit: Unit, given: File | None, most: int) -> File:
    picture = unit.input_image or unit.image
    if isinstance(picture, dict):
        if picture.get("mask"):
            raise Problem("a unit has a mask", needed="none", fix="leave it out", param="mask")
        picture = picture.get("image")
    if picture:
        return base64_file("image", picture, most)
    if given is None:
        raise Problem("a unit has no image", needed="what the ControlNet follows", param="image")
    return given


def _chosen(param: str, given: int | str, names: tuple[tuple[str, ...], ...] | list[tuple[str, ...]]) -> int:
    for number, own in enumerate(names):
        if given == number or str(given) in (*own, str(number)):
            return number
    raise unknown(param, str(given), [name for own in names for name in own])


def _fitted(picture: Image.Image, size: tuple[int, int], *, unit: Unit, module: str, mode: int) -> Image.Image:
    """Return the map of a picture: resized in the unit's way, then preprocessed."""
    picture = picture.convert("RGB")
    if mode == 0:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    else:
        resize = ImageOps.fit if mode == 1 else ImageOps.pad
        picture = resize(picture, size, Image.Resampling.LANCZOS)
    return MODULES[module](picture, unit)


@router.get("/version")
async def version() -> dict[str, int]:
    """Of the API, as the extension tells it."""
    return {"version": 2}


@router.get("/model_list")
async def model_list(context: Chosen) -> dict[str, list[str]]:
    """Names for a unit's `model`."""
    return {"model_list": list(context.catalog.controls)}


@router.get("/module_list")
async def module_list() -> dict[str, list[str]]:
    """Names for a unit's `module`: maps that need no network."""
    return {"module_list": list(MODULES)}
