"""ControlNets and IP-Adapters as units of A1111's extension in `alwayson_scripts`, and what there is to choose from.

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

from latentrt.guides import Control, ImagePrompt
from latentrt.images.given import WHITE
from latentrt.images.hints import blurred, edges, inverted
from latentrt.serve.http.catalog import Catalog, unknown
from latentrt.serve.http.controls import MOST, Sent, check_name
from latentrt.serve.http.errors import Problem, answer_to_validation
from latentrt.serve.http.generation import Chosen
from latentrt.serve.http.images import File, base64_file

router = APIRouter(prefix="/controlnet", tags=["A1111"])
SCRIPT = "controlnet"
LOOKING = "ip-adapter"  # begins the names of modules of IP-Adapters
RESIZING: tuple[tuple[str, ...], ...] = (  # by resize_mode
    ("Just Resize",),
    ("Crop and Resize", "Scale to Fit (Inner Fit)"),
    ("Resize and Fill", "Envelope (Outer Fit)"),
)
BALANCED, PROMPT, CONTROL = "Balanced", "My prompt is more important", "ControlNet is more important"
MODES = (BALANCED, PROMPT, CONTROL)  # by control_mode
UNION = ("OpenPose", "Depth", "Soft Edge", "Hard Edge", "Normal Map", "Segmentation", "Tile", "Inpaint")  # by number
UNKNOWN = "Unknown"  # of a ControlNet that is no Union


class Unit(BaseModel):
    """A ControlNet or IP-Adapter in a request. Fields that change no picture here are ignored."""

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
    union_control_type: str | None = None


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


def add_ons_of(
    scripts: Mapping[str, Any] | None, catalog: Catalog, given: File | None, most: int
) -> dict[str, dict[str, Any]]:
    """Return a request's fields `control` and `ip_adapter`.

    Args:
        scripts: its `alwayson_scripts`.
        catalog: of the server.
        given: the picture that it begins on, for units without one.
        most: bytes of a picture.

    Raises:
        Problem: a script that is not here, a unit that is none, or one that asks for what is not done.
        RequestError: a unit's start is after its end.
    """
    found: dict[str, dict[str, Any]] = {"control": {}, "ip_adapter": {}}
    for script_name, script in (scripts or {}).items():
        arguments = script.get("args") if isinstance(script, dict) else script
        if arguments and script_name.lower() != SCRIPT:
            told = f"there is a script {script_name[:100]!r}"
            raise Problem(told, needed="controlnet, or none", param="alwayson_scripts")
        for number, unit in enumerate(arguments or ()):
            one = _parsed(unit, f"alwayson_scripts.{script_name}.args.{number}")
            name = (one.model or "None").partition(" [")[0]
            if not one.enabled:
                continue
            if any(name in known for known in found.values()):
                raise Problem(f"two units have the model {name}", needed="one", fix="leave one out", param="model")
            _check_common(one)
            if name in catalog.ip_adapters and name not in catalog.controls:
                found["ip_adapter"][name] = _image_prompt(one, given, most)
            else:
                check_name("model", name, catalog)
                found["control"][name] = _control(one, given, most)
    return found


def _check_common(unit: Unit) -> None:
    """Refuse what no unit can do. Raise Problem."""
    if unit.mask:
        raise Problem("a unit has a mask", needed="none", fix="leave it out", param="mask")
    if unit.hr_option != "Both":
        raise Problem(f"hr_option is {unit.hr_option[:100]!r}", needed="Both", param="hr_option")


def _parsed(unit: Any, place: str) -> Unit:
    try:
        return Unit.model_validate(unit)
    except ValidationError as error:
        answer = answer_to_validation(error.errors())
        raise Problem(f"{place}: {answer.body['error']['message']}", needed="a unit", param=place) from error


def _control(unit: Unit, given: File | None, most: int) -> Control:
    module = OTHERS.get((unit.module or "none").lower(), (unit.module or "none").lower())
    if module not in MODULES:
        raise unknown("module", module, MODULES)
    mode = _chosen("control_mode", unit.control_mode, [(name,) for name in MODES])
    if MODES[mode] == PROMPT:
        raise Problem(f"control_mode is {PROMPT!r}", needed=f"{BALANCED} or {CONTROL}", param="control_mode")
    fit = partial(_fitted, unit=unit, module=module, mode=_chosen("resize_mode", unit.resize_mode, RESIZING))
    scale, start, end, guess = unit.weight, unit.guidance_start, unit.guidance_end, MODES[mode] == CONTROL
    kind = unit.union_control_type or UNKNOWN
    number = None if kind == UNKNOWN else _chosen("union_control_type", kind, [(each,) for each in UNION])
    sent = Sent(_file(unit, given, most), fit)
    return Control(sent, scale=scale, start=start, end=end, guess=guess, type=number)


def _image_prompt(unit: Unit, given: File | None, most: int) -> ImagePrompt:
    """Return what an IP-Adapter shows: the middle of the picture, however the client would resize it."""
    module = (unit.module or "none").lower()
    if module not in ("", "none") and not module.startswith(LOOKING):
        raise unknown("module", module, ("none", f"{LOOKING}-auto"))
    mode = _chosen("control_mode", unit.control_mode, [(name,) for name in MODES])
    if MODES[mode] != BALANCED:
        raise Problem(f"control_mode is {MODES[mode]!r}", needed=f"{BALANCED}, of an IP-Adapter", param="control_mode")
    if (unit.guidance_start, unit.guidance_end) != (0.0, 1.0):
        found = f"an IP-Adapter acts from {unit.guidance_start:g} to {unit.guidance_end:g}"
        raise Problem(found, needed="the whole run: 0 to 1", param="guidance_start")
    return ImagePrompt(Sent(_file(unit, given, most)), unit.weight)


def _file(unit: Unit, given: File | None, most: int) -> File:
    picture = unit.input_image or unit.image
    if isinstance(picture, dict):
        if picture.get("mask"):
            raise Problem("a unit has a mask", needed="none", fix="leave it out", param="mask")
        picture = picture.get("image")
    if picture:
        return base64_file("image", picture, most)
    if given is None:
        raise Problem(
            "a unit has no image", needed="what the ControlNet follows, or the IP-Adapter shows", param="image"
        )
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
    return {"model_list": [*context.catalog.controls, *context.catalog.ip_adapters]}


@router.get("/module_list")
async def module_list(context: Chosen) -> dict[str, list[str]]:
    """Names for a unit's `module`: maps that need no network; an IP-Adapter has its own image encoder."""
    return {"module_list": [*MODULES, *([f"{LOOKING}-auto"] if context.catalog.ip_adapters else [])]}
