"""ControlNets in requests: what both APIs say of them, and their pictures, read once a request has its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from latentrt.request import Control
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


@dataclass(frozen=True, slots=True)
class Sent:
    """A control's picture that is not read yet.

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
