"""Pictures to start from: image-to-image and inpainting.

A given picture is brought to the run's size, encoded once, and every job begins on latents of it with as much noise as
the schedule has where the job begins. With a mask, what is not repainted is put back after every row
(`sampling.table.blend`). Sizes, filters, thresholds and the order in which a seed's noise is drawn are those of
diffusers' image-to-image and inpainting pipelines, so that the same seed gives the same picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import LatentSpec
from latentrt.errors import RequestError
from latentrt.model.networks import Encoded
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import Kept, Table, noised

Float32 = NDArray[np.float32]
Pixels = NDArray[np.uint8]

if TYPE_CHECKING:
    from PIL.Image import Image

    Source = Image | Pixels

STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # diffusers' own defaults
WHITE = 128  # of 255, from where on a mask repaints
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # 8 bits a channel


@dataclass(frozen=True, slots=True)
class Edit:
    """A given picture as jobs start from it; `Engine.edit` makes one.

    Attributes:
        encoded: the picture's latents, (channels, height, width), as a Gaussian.
        mask: (height, width) float32, 1 where to repaint and 0 elsewhere; None: everywhere.
        size: (height, width) in pixels.
        facts: what a picture made from it says of it.
    """

    encoded: Encoded
    mask: Float32 | None
    size: tuple[int, int]
    facts: Mapping[str, str]

    @classmethod
    def of(cls, encoded: Encoded, pixels: Pixels, repaint: NDArray[np.bool_] | None) -> Edit:
        """From the picture's pixels (height, width, 3) and which of them to repaint, (height, width).

        Raises:
            RequestError: the mask repaints none of the latents.
        """
        height, width = pixels.shape[:2]
        facts = {"image": f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"}
        if repaint is None:
            return cls(encoded, None, (height, width), facts)
        facts["mask"] = f"sha256:{hashlib.sha256(repaint.tobytes()).hexdigest()}"
        factor = height // encoded.mean.shape[1]
        mask = repaint[::factor, ::factor].astype(np.float32)  # torch's nearest neighbour
        if not mask.any():
            raise RequestError(
                "the mask repaints nothing",
                needed=f"white where to repaint, at least {factor} pixels wide",
                fix="invert the mask, or make its white parts larger",
            )
        return cls(encoded, mask, (height, width), facts)

    def on(self, request: Request) -> Request:
        """The request with this picture's size, and with a strength.

        Raises:
            RequestError: the request wants another size.
        """
        for side, own, wanted in zip(("height", "width"), self.size, (request.height, request.width), strict=True):
            if wanted not in (None, own):
                raise RequestError(
                    f"{side} is {wanted}, and the picture was encoded at {own}",
                    needed=f"{side} {own}",
                    fix=f"Engine.edit(..., {side}={wanted})",
                )
        strength = request.strength
        if strength is None:
            strength = STRENGTH if self.mask is None else MASKED_STRENGTH
        return replace(request, height=self.size[0], width=self.size[1], strength=strength)

    def begin(self, table: Table, noise: NoiseSource, strength: float) -> tuple[Float32, Kept | None]:
        """A job's first latents, and what it keeps.

        The draws are diffusers': the VAE's, the run's own, and with a mask one more, by which the inpainting pipelines
        encode the masked picture for networks that read it, and which those that do not read it still spend.
        """
        shape = self.encoded.mean.shape
        clean = self.encoded.draw(noise.normal(shape))
        unit = noise.normal(shape)
        if self.mask is None:
            return noised(table.known[0], clean, unit), None
        noise.normal(shape)
        first = unit * np.float32(table.start) if strength == 1 else noised(table.known[0], clean, unit)
        return first, Kept(np.broadcast_to(self.mask, shape), clean, unit)


def on(request: Request, edit: Edit | None) -> Request:
    """The request as it is on a given picture, where there is one.

    Raises:
        RequestError: the picture has another size; there is a strength and no picture.
    """
    if edit is not None:
        return edit.on(request)
    if request.strength is not None:
        raise RequestError(
            f"strength is {request.strength:g} and there is no picture",
            needed="a picture to start from",
            fix="pass one: image=, --image",
        )
    return request


def prepared(
    image: Source, mask: Source | None, height: int | None, width: int | None, latents: LatentSpec
) -> tuple[Pixels, NDArray[np.bool_] | None]:
    """Bring a picture and its mask to the run's size: pixels (height, width, 3), and which to repaint (height, width).

    Raises:
        RequestError: a kind, mode or size that cannot be used; a mask of another size than the picture.
    """
    picture = _opaque(_picture(image, "image"))
    own = picture.width, picture.height
    size = tuple(
        wanted or side // latents.factor * latents.factor or side
        for wanted, side in zip((width, height), own, strict=True)
    )
    latents.shape_of(size[1], size[0])  # complains about what is no multiple
    pixels = np.asarray(_resized(picture, size))
    return pixels, None if mask is None else _repaint(_picture(mask, "mask"), own, size)


def open_picture(path: str | Path) -> Image:
    """A picture from a file, the way up that its EXIF orientation says.

    Raises:
        RequestError: there is none that PIL can read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read ({error})", needed="a picture, such as PNG or JPEG") from error


def _picture(source: Any, name: str) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        if source.mode in MODES:
            return source
        found = f"the {name} has the mode {source.mode}"
        raise RequestError(found, needed=f"one of {', '.join(MODES)}", fix='convert it: image.convert("RGB")')
    if name == "mask" and isinstance(source, np.ndarray) and source.ndim == 2 and source.dtype in (np.bool_, np.uint8):
        return Image.fromarray(source if source.dtype == np.uint8 else source.astype(np.uint8) * np.uint8(255))
    if isinstance(source, np.ndarray) and source.dtype == np.uint8 and source.ndim == 3 and source.shape[2] == 3:
        return Image.fromarray(source)
    kind = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    shapes = "(height, width) of uint8 or bool" if name == "mask" else "(height, width, 3) of uint8"
    raise RequestError(f"the {name} is {kind}", needed=f"a PIL image or an array {shapes}")


def _opaque(picture: Image) -> Image:
    """RGB, on white."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture.convert("RGBA"))
    return ground.convert("RGB")


def _repaint(mask: Image, own: tuple[int, int], size: tuple[int, ...]) -> NDArray[np.bool_]:
    if mask.size != own:
        raise RequestError(
            f"the mask is {mask.width}x{mask.height} and the image {own[0]}x{own[1]}",
            needed="a mask of the image's size",
            fix="resize or crop the mask",
        )
    if mask.has_transparency_data and np.asarray(mask.convert("RGBA"))[..., 3].min() < 255:
        raise RequestError(
            "the mask has transparent pixels",
            needed="white where to repaint and black elsewhere",
            fix="flatten the mask",
        )
    return np.asarray(_resized(mask, size).convert("L")) >= WHITE


def _resized(picture: Image, size: tuple[int, ...]) -> Image:
    from PIL import Image

    return picture.resize((size[0], size[1]), Image.Resampling.LANCZOS)
