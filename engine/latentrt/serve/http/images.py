"""Files that clients send → arrays; pictures → files in base64. All of it runs in threads, off the event loop."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import anyio.to_thread
import numpy as np
from PIL import Image, ImageChops, ImageOps

from latentrt.bundle.spec import LatentSpec
from latentrt.errors import RequestError
from latentrt.images.depth import to_eight_bits
from latentrt.images.depth_map import depth_of
from latentrt.images.given import MODES, WHITE, prepared, prepared_low
from latentrt.serve.http.errors import Problem

if TYPE_CHECKING:
    from latentrt.images.given import Source

T = TypeVar("T")
ToMask = Callable[[Image.Image, str], Image.Image]
FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: those that swap width and height
_THREADS = anyio.CapacityLimiter(2)  # enough to keep up with any engine, too few to take the CPU from it


@dataclass(frozen=True, slots=True)
class File:
    """A picture as it came: read once its request has a place in the queue, so that many wait on disk.

    Attributes:
        name: of the field, for the client.
        open: opens it at its first byte.
        to_mask: makes levels of grey of a mask, white where to repaint; None: it is no mask.
        masks: whether a picture's own alpha is the mask, where it has some that repaints.
    """

    name: str
    open: Callable[[], BinaryIO]
    to_mask: ToMask | None = None
    masks: bool = False


Files = Mapping[str, File]  # by what they are for, as `Request.pictures`


async def in_thread(work: Callable[[], T]) -> T:
    """Run work that takes milliseconds of CPU in a thread, so that the event loop goes on."""
    return await anyio.to_thread.run_sync(work, limiter=_THREADS)


def decode(
    files: Files,
    size: tuple[int, int],
    latents: LatentSpec,
    most_pixels: int,
    *,
    enlarges: int = 1,
    masked: bool = False,
    resize: str = "stretch",
) -> dict[str, Source]:
    """Return the pictures of files: pixels, a mask that is 255 where to repaint, and a depth map as it came.

    Args:
        files: by use.
        size: width and height of what is drawn; pixels and mask have it too.
        latents: the model's.
        most_pixels: that a file may have.
        enlarges: how many times as large the model draws the picture: its pixels have that part of the size.
        masked: whether the request says how its mask is used: then picture and mask are as they came.
        resize: how they are brought to the size.

    Raises:
        Problem: 400 image_decode_failed, a mask that does not fit the picture, or what is no depth map.
    """
    images = {purpose: loaded(file, most_pixels, deep=purpose == "depth") for purpose, file in files.items()}
    if "depth" in files:
        _check_depth(images["depth"], files["depth"].name)
    for purpose, file in files.items():
        if file.to_mask is not None:
            sides, needed = (f"{one.width}x{one.height}" for one in (images[purpose], images["image"]))
            if sides != needed:
                raise Problem(
                    f"{file.name} is {sides}", needed=f"the picture's {needed}", fix="resize it", param=file.name
                )
            images[purpose] = file.to_mask(images[purpose], file.name)
    if "image" in files and files["image"].masks and "A" in images["image"].getbands():
        area = alpha_mask(images["image"], "image")
        if np.asarray(area).max() >= WHITE:
            images["mask"] = area
    width, height = size
    if masked:
        return dict(images)
    if enlarges > 1:
        return {"image": prepared_low(images["image"], height, width, latents, enlarges)}
    pixels, repaint = prepared(images["image"], images.get("mask"), height, width, latents, resize)
    pictures: dict[str, Source] = {"image": pixels.repeat(3 // pixels.shape[2], axis=2)}  # grey ones in colour too
    if repaint is not None:
        pictures["mask"] = repaint.astype(np.uint8) * np.uint8(255)
    return pictures | ({"depth": images["depth"]} if "depth" in images else {})


def shape_of(file: File, most_pixels: int) -> tuple[int, int]:
    """Return width and height as seen (EXIF's rotation counts); read the header alone.

    Raises:
        Problem: 400 image_decode_failed.
    """
    with _opened(file.open(), file.name, most_pixels) as image:
        try:
            # Without the first condition a PNG is decoded to look for it behind the pixels.
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in _TURNED
        except Exception as error:  # it may be broken as well
            raise _undecodable(file.name, "damaged") from error
        return (image.height, image.width) if turned else image.size


def may_be_clear(file: File, most_pixels: int) -> bool:
    """Return whether a picture may have transparent parts, by its header. Raise Problem as `shape_of`."""
    with _opened(file.open(), file.name, most_pixels) as image:
        return image.has_transparency_data


def alpha_mask(mask: Image.Image, name: str) -> Image.Image:
    """Return OpenAI's kind of mask, which repaints where its alpha is 0.

    Raises:
        Problem: it has no alpha.
    """
    if "A" not in mask.getbands():
        needed = "a PNG whose alpha is 0 where to edit"
        raise Problem(f"{name} has no alpha", needed, fix="save it so", param=name)
    return ImageChops.invert(mask.getchannel("A"))


def white_mask(mask: Image.Image, name: str, *, inverted: bool = False) -> Image.Image:
    """Return A1111's kind of mask, which repaints where it is white: its alpha if it has some, or its brightness."""
    alpha = mask.getchannel("A") if "A" in mask.getbands() else None
    grey = mask.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha
    return ImageChops.invert(grey) if inverted else grey


def file_of(image: Image.Image, kind: str = "png", quality: int | None = None, **more: Any) -> bytes:
    """Return a file: png, jpeg or webp; a picture of the engine takes its settings along. `more` is PIL's."""
    buffer = BytesIO()
    image.save(buffer, kind, **more, **({} if quality is None or kind == "png" else {"quality": quality}))
    return buffer.getvalue()


def encode(image: Image.Image, kind: str = "png", quality: int | None = None, **more: Any) -> str:
    """Return the base64 of such a file."""
    return base64.b64encode(file_of(image, kind, quality, **more)).decode("ascii")


def from_base64(text: str, name: str, most_bytes: int) -> bytes:
    """Return the bytes of base64 text, in lines or not, or of a data: URL; no other URL is ever read.

    Raises:
        Problem: a URL, or no base64, or too much of it.
    """
    if text.startswith(("http:", "https:", "file:", "ftp:")):
        raise Problem(f"{name} is a URL", needed="the picture itself, as base64", fix="send its bytes", param=name)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    text = "".join(text.split())  # MIME's lines
    if len(text) > most_bytes * 4 // 3 + 4:
        raise too_many_bytes(name, most_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _undecodable(name, "no base64") from error


def base64_file(name: str, text: str, most_bytes: int, to_mask: ToMask | None = None) -> File:
    """Return a picture that came as base64; it is decoded when it is opened."""
    return File(name, lambda: BytesIO(from_base64(text, name, most_bytes)), to_mask)


def too_many_bytes(name: str, most: int) -> Problem:
    """Return the refusal of a file that is too large."""
    needed, fix = f"at most {most} bytes", "send a smaller picture"
    return Problem(f"{name} is too large", needed, fix, param=name, status=413, code="image_too_large")


def _check_depth(image: Image.Image, name: str) -> None:
    try:
        depth_of(image)
    except RequestError as error:
        raise Problem(error.found, error.needed, error.fix, param=name) from error


def loaded(file: File, most_pixels: int, *, deep: bool = False) -> Image.Image:
    """Return a file's picture upright, with 8 bits a channel, palettes and their transparency resolved; close it.

    With `deep` it is as it came.

    Raises:
        Problem: 400 image_decode_failed.
    """
    with file.open() as data:
        image = _opened(data, file.name, most_pixels)
        try:
            image.load()
            if deep:
                return ImageOps.exif_transpose(image)
            upright = to_eight_bits(ImageOps.exif_transpose(image), file.name)
            if "transparency" in upright.info:
                return upright.convert("RGBA")
            return upright if upright.mode in MODES else upright.convert("RGB")
        except Exception as error:  # what a decoder raises on broken input is not specified
            raise _undecodable(file.name, "damaged") from error


def _opened(data: BinaryIO, name: str, most_pixels: int) -> Image.Image:
    """Return a picture whose header was read; its size is checked before anything is decoded."""
    try:
        image = Image.open(data, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _undecodable(name, "too many pixels") from error
    except Exception as error:
        raise _undecodable(name, f"no {', '.join(FORMATS)}, or damaged") from error
    if image.width * image.height > most_pixels:
        raise _undecodable(name, f"{image.width}x{image.height} pixels, more than {most_pixels} in all")
    return image


def _undecodable(name: str, why: str) -> Problem:
    needed, fix = f"a whole picture: {', '.join(FORMATS)}", "send another file"
    return Problem(f"{name} cannot be decoded: {why}", needed, fix, param=name, code="image_decode_failed")
