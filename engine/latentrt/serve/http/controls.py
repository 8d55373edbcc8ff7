"""ControlNets and IP-Adapters in requests: what APIs say of them; pictures, read once a request has its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from latentrt.guides import Control, ImagePrompt
from latentrt.serve.http.catalog import Catalog, unknown
from latentrt.serve.http.images import File, base64_file, loaded

Fit = Callable[[Image.Image, tuple[int, int]], Image.Image]  # a picture, and the width and height that it is to have
MOST = 1000.0  # of a scale, as of `Control`


class Unit(BaseModel):
    """A ControlNet in a request of /v1/images."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: Annotated[str, Field(description="What it follows, as base64: a map of the kind it was trained with.")]
    scale: Annotated[float, Field(ge=0, le=MOST, description="How strongly: 1 is as trained.")] = 1.0
    start: Annotated[float, Field(ge=0, le=1, description="The part of the run before it acts.")] = 0.0
    end: Annotated[float, Field(ge=0, le=1, description="The part of the run after which it acts no more.")] = 1.0
    guess: Annotated[bool, Field(description="It acts on the lane with the prompt alone (guess mode).")] = False
    type: Annotated[str | int | None, Field(description="The map's kind, of a ControlNet Union: canny, or 3.")] = None


class Shown(BaseModel):
    """An IP-Adapter in a request of /v1/images."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    image: Annotated[str, Field(description="The picture that it shows the model, as base64.")]
    scale: Annotated[
        float | dict[str, Any],
        Field(description='How strongly: 1 is as trained; or by block, as {"up": {"block_0": [0, 1, 0]}}.'),
    ] = 1.0


@dataclass(frozen=True, slots=True)
class Sent:
    """The picture of a ControlNet or an IP-Adapter that is not read yet.

    Attributes:
        file: as it came.
        fit: makes the map of the picture; None: the picture is the map, and the engine resizes it.
    """

    file: File
    fit: Fit | None = None


def controls_of(units: Mapping[str, Unit] | None, catalog: Catalog, most_bytes: int) -> dict[str, Control]:
    """Return the controls of a request of /v1/images.

    Raises:
        Problem: there is no such ControlNet.
        RequestError: a start is after its end.
    """
    found = {}
    for name, unit in (units or {}).items():
        check_name("control", name, catalog)
        file = base64_file(f"control.{name}.image", unit.image, most_bytes)
        found[name] = Control(Sent(file), **unit.model_dump(exclude={"image"}))
    return found


def image_prompts_of(given: Mapping[str, Shown] | None, catalog: Catalog, most_bytes: int) -> dict[str, ImagePrompt]:
    """Return what IP-Adapters show in a request of /v1/images.

    Raises:
        Problem: there is no such IP-Adapter.
        RequestError: a scale is out of range.
    """
    found = {}
    for name, one in (given or {}).items():
        if name not in catalog.ip_adapters:
            raise unknown("ip_adapter", name, catalog.ip_adapters or ("none: this server has no IP-Adapters",))
        file = base64_file(f"ip_adapter.{name}.image", one.image, most_bytes)
        found[name] = ImagePrompt(Sent(file), one.scale)
    return found


def check_name(param: str, name: str, catalog: Catalog) -> None:
    """Refuse a ControlNet that the server does not have. Raise Problem."""
    if name not in catalog.controls:
        raise unknown(param, name, tuple(catalog.controls) or ("none: this server has no ControlNets",))


def read(controls: Mapping[str, Control], size: tuple[int, int], most_pixels: int) -> dict[str, Control]:
    """Return controls with their pictures read.

    Args:
        controls: each with an image that is `Sent`.
        size: width and height of what they follow.
        most_pixels: that a file may have.

    Raises:
        Problem: 400 image_decode_failed.
    """
    found = {}
    for name, control in controls.items():
        sent: Sent = control.image
        picture = loaded(sent.file, most_pixels)
        found[name] = replace(control, image=picture if sent.fit is None else sent.fit(picture, size))
    return found


def shown(prompts: Mapping[str, ImagePrompt], most_pixels: int) -> dict[str, ImagePrompt]:
    """Return what IP-Adapters show with its pictures read, as `read` does."""
    return {name: replace(one, image=loaded(one.image.file, most_pixels)) for name, one in prompts.items()}
