"""Pictures of a request: read, checked, and resized to the run's size as diffusers does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import LatentSpec
from latentrt.errors import RequestError
from latentrt.images.depth import DEEP, scaled, to_eight_bits, white_of
from latentrt.images.inpaint import Overlay, blurred, doubled, filled, region
from latentrt.images.resize import fitted, resized
from latentrt.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    Source = Image | NDArray[np.uint8] | NDArray[np.uint16]

Pixels = NDArray[np.uint8]
WHITE = 128  # of 255, the least value that repaints
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")  # 8 bits a channel


def prepared(
    image: Source,
    mask: Source | None,
    height: int | None,
    width: int | None,
    latents: LatentSpec,
    resize: str = "stretch",
) -> tuple[Pixels, NDArray[np.bool_] | None]:
    """Bring a picture and its mask to the run's size.

    Args:
        image: a PIL image, or uint8 or uint16 (height, width, 3). Transparent parts become white.
        mask: of the picture's own size, white where to repaint; a PIL image, or bool, uint8 or uint16 (height, width).
        height, width: of the run in pixels; None is the picture's own, rounded down to a size of the model's.
        latents: which sizes the model takes, and whether it draws in colour.
        resize: how it is brought there; see `Request`.

    Returns:
        Pixels (height, width, channels), and which of them to repaint, (height, width); None: no mask was given.

    Raises:
        RequestError: a kind, mode or size that cannot be used; a mask of another size than the picture.
    """
    picture = _opaque(_picture(image, "image"))
    own, size = (picture.width, picture.height), _size_of(picture, height, width, latents)
    grey = latents.factor == 1 and latents.channels == 1
    pixels = np.asarray(resized(picture.convert("L") if grey else picture, size, resize))
    repaint = None if mask is None else _repaint(_picture(mask, "mask"), own, size, resize)
    return (pixels[..., None] if grey else pixels), repaint


def inpainted(
    image: Source, mask: Source, request: Request, latents: LatentSpec
) -> tuple[Pixels, NDArray[np.bool_], Overlay | None]:
    """Bring the part of a picture that is repainted to the run's size, as the request's `mask_...` settings say.

    Args:
        image, mask, latents: as of `prepared`.
        request: its size is the run's; None is the picture's own, or with a mask_crop the model's.

    Returns:
        As `prepared`, and what is laid over the drawn picture, if anything.

    Raises:
        RequestError: as of `prepared`; the mask repaints nothing.
    """
    picture = _opaque(_picture(image, "image"))
    if latents.factor == 1 and latents.channels == 1:
        picture = picture.convert("L")
    area = _picture(mask, "mask")
    _check_mask(area, picture.size)
    area = blurred(area.convert("L"), request.mask_blur)
    if request.mask_crop is None:
        width, height = _size_of(picture, request.height, request.width, latents)
        picture, area = (resized(one, (width, height), request.resize) for one in (picture, area))
        overlay = Overlay(picture, doubled(area))
    else:
        height, width = latents.pixels_of(request.height, request.width)
        box = region(area, request.mask_crop, (width, height))
        overlay = Overlay(picture, area, box)
        picture, area = fitted(picture.crop(box), (width, height)), fitted(area.crop(box), (width, height))
    if request.mask_fill != "original":
        picture = filled(picture, area)
    pixels = np.asarray(picture).reshape(height, width, -1)
    return pixels, np.asarray(area) >= WHITE, overlay if request.keeps_pixels else None


def prepared_low(image: Source, height: int | None, width: int | None, latents: LatentSpec, times: int) -> Pixels:
    """Bring a picture that is to be enlarged to its size, by the bicubic filter of diffusers' upscalers.

    Args:
        image: as of `prepared`.
        height, width: of the run in pixels; None is the picture's own, rounded down to one that the VAE, and enlarged
            the model, takes.
        latents: which sizes the model takes.
        times: how many times as large it will be drawn.

    Returns:
        Pixels (height, width, 3).

    Raises:
        RequestError: as of `prepared`.
    """
    from PIL import Image

    picture = _opaque(_picture(image, "image"))
    latents.shape_of(height, width)  # raises for sides that are not multiples
    own = enlarged_size(picture.width, picture.height, latents, times)
    columns, rows = (side or default for side, default in zip((width, height), own, strict=True))
    latents.shape_of(rows, columns)  # and for pictures that are too small
    columns, rows = columns // times, rows // times
    return np.asarray(picture.resize((columns, rows), Image.Resampling.BICUBIC))


def hint_size(image: Source | NDArray[np.floating[Any]], step: int) -> tuple[int, int]:
    """Return the (height, width) of pictures that follow a picture: its own, rounded down to multiples of `step`."""
    width, height = image.shape[1::-1] if _is_ready(image) else _hint(image).size
    return height // step * step or height, width // step * step or width


def prepared_hint(
    image: Source | NDArray[np.floating[Any]],
    height: int,
    width: int,
    overlay: Overlay | None = None,
    *,
    channels: int = 3,
) -> NDArray[np.float32]:
    """Bring a ControlNet's picture to the run's size, as diffusers' pipelines do.

    Args:
        image: a PIL image, or a uint8 or uint16 array (height, width, 3), or (height, width) of grey. Or a map that is
            ready (`hints.masked`): a float array of the run's size, (height, width, 3), which is taken as it is.
        height, width: of the run in pixels.
        overlay: of a run that draws a part of a picture: of a map of the whole picture that part is taken.
        channels: that are read: 3 of RGB, or 1 of grey.

    Returns:
        (channels, height, width), float32 in 0..1.

    Raises:
        RequestError: a kind or mode that cannot be used; a map that is ready of another size, or for one channel.
    """
    if _is_ready(image):
        if image.shape[:2] != (height, width):
            found = f"the control picture of floats is {image.shape[1]}x{image.shape[0]}"
            raise RequestError(found, needed=f"{width}x{height}, as the run", fix="resize the picture before its map")
        if channels != 3:
            found = "the control picture is of floats, for a T2I-Adapter that reads grey"
            raise RequestError(found, needed="whole numbers, or a PIL image")
        pixels = image.astype(np.float32)
    else:
        hint = _hint(image)
        if overlay is not None and overlay.box is not None:
            hint = fitted(resized(hint, overlay.picture.size).crop(overlay.box), (width, height))
        hint = resized(hint if channels == 3 else hint.convert("L"), (width, height))
        pixels = (np.asarray(hint, np.float32) / np.float32(255)).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _is_ready(image: Any) -> TypeGuard[NDArray[np.floating[Any]]]:
    return isinstance(image, np.ndarray) and image.dtype.kind == "f" and image.ndim == 3 and image.shape[2] == 3


def in_rgb(image: Any, name: str) -> Image:
    """Return a picture that may be grey in RGB, on white; `name` is for errors. Raise RequestError for other kinds."""
    grey = isinstance(image, np.ndarray) and image.ndim == 2
    return _opaque(_picture(np.stack([image] * 3, axis=-1) if grey else image, name))


def _hint(image: Any) -> Image:
    return in_rgb(image, "control picture")


def enlarged_size(width: int, height: int, latents: LatentSpec, times: int) -> tuple[int, int]:
    """Return width and height of what an upscaler makes of a picture: first down to what VAE and model take."""
    step = max(latents.factor, latents.step // times)
    width, height = ((side // step * step or side) * times for side in (width, height))
    return width, height


def open_picture(path: str | Path, *, deep: bool = False) -> Image:
    """Return the picture in a file, turned as its EXIF orientation says, with 8 bits a channel.

    With `deep` it keeps the bits that it has.

    Raises:
        RequestError: PIL cannot read a picture there, or its values say no clear range.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright if deep else to_eight_bits(upright, f"picture {path}", white_of(image))
    except RequestError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RequestError(f"{path} cannot be read ({error})", needed="a picture, such as PNG or JPEG") from error


def _size_of(picture: Image, height: int | None, width: int | None, latents: LatentSpec) -> tuple[int, int]:
    """Return the run's width and height. Raise RequestError for sides that are not multiples of the model's."""
    step = latents.step
    width = width or picture.width // step * step or picture.width
    height = height or picture.height // step * step or picture.height
    latents.shape_of(height, width)
    return width, height


def _picture(source: Any, name: str) -> Image:
    from PIL import Image

    if isinstance(source, Image.Image):
        if source.mode in MODES or source.mode in DEEP:
            return to_eight_bits(source, name)
        found = f"the {name} has the mode {source.mode}"
        raise RequestError(found, needed=f"one of {', '.join(MODES)}", fix='convert it: image.convert("RGB")')
    if isinstance(source, np.ndarray):
        deep = source.dtype.kind == "u" and source.dtype.itemsize == 2  # of either byte order
        array = scaled(source) if deep else source
        if name == "mask" and array.ndim == 2 and array.dtype in (np.bool_, np.uint8):
            return Image.fromarray(array if array.dtype == np.uint8 else array.astype(np.uint8) * np.uint8(255))
        if array.dtype == np.uint8 and array.ndim == 3 and array.shape[2] == 3:
            return Image.fromarray(array)
    kind = f"{source.dtype} {source.shape}" if isinstance(source, np.ndarray) else type(source).__name__
    shapes = "(height, width) of uint8, uint16 or bool" if name == "mask" else "(height, width, 3) of uint8 or uint16"
    raise RequestError(f"the {name} is {kind}", needed=f"a PIL image or an array {shapes}")


def _opaque(picture: Image) -> Image:
    """Return the picture in RGB, on white."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    ground.alpha_composite(picture.convert("RGBA"))
    return ground.convert("RGB")


def _repaint(mask: Image, own: tuple[int, int], size: tuple[int, int], resize: str) -> NDArray[np.bool_]:
    _check_mask(mask, own)
    return np.asarray(resized(mask, size, resize).convert("L")) >= WHITE


def _check_mask(mask: Image, own: tuple[int, int]) -> None:
    """Raise RequestError where it is no mask for a picture of this size."""
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
