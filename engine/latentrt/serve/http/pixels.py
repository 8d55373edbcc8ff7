"""Files that clients send → arrays, pictures → what is sent back. Runs in threads of its own, off the event loop."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, BinaryIO, TypeVar

import anyio.to_thread
import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import LatentSpec
from latentrt.model.edit import MODES, prepared
from latentrt.serve.http.problems import Problem

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Uint8 = NDArray[np.uint8]
Opener = Callable[[], BinaryIO]  # of a file from its first byte on
FORMATS = ("PNG", "JPEG", "WEBP")
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # of EXIF: those that swap width and height
_THREADS = anyio.CapacityLimiter(2)  # enough to keep up with any engine, too few to take the CPU from it


@dataclass(frozen=True, slots=True)
class Source:
    """A picture to edit, as it came: files that are read once a place is reserved, so that a crowd's wait on disk.

    `mask_alpha` says how the mask is meant: alpha 0 is edited (OpenAI), or white is (A1111).
    """

    image: Opener
    mask: Opener | None = None
    mask_alpha: bool = True
    mask_inverted: bool = False
    names: tuple[str, str] = ("image", "mask")


async def in_thread(work: Callable[[], T]) -> T:
    """Run something that takes milliseconds of CPU where the event loop does not wait for it."""
    return await anyio.to_thread.run_sync(work, limiter=_THREADS)


async def decode(
    source: Source, size: tuple[int, int], latents: LatentSpec, most_pixels: int
) -> tuple[Uint8, Uint8 | None]:
    """The picture (H, W, 3) and the mask (H, W), 255 where it is repainted, both of the given width and height.

    They are brought to size here, as the engine would do it, because they wait in the queue.

    Raises:
        Problem: 400 image_decode_failed, or a mask that does not fit the picture.
    """
    return await in_thread(partial(_decode, source, size, latents, most_pixels))


def shape_of(file: Opener, param: str, most_pixels: int) -> tuple[int, int]:
    """Width and height as seen (EXIF's rotation counts); reads the header alone.

    Raises:
        Problem: 400 image_decode_failed.
    """
    with _opened(file(), param, most_pixels) as image:
        try:
            # Without the first condition a PNG is decoded to look for it behind the pixels.
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION) in _TURNED
        except Exception as error:  # it may be broken as well
            raise _undecodable(param, "damaged") from error
        return (image.height, image.width) if turned else image.size


def encode(image: Image, kind: str, quality: int | None = None) -> str:
    """Base64 of a file: png, jpeg or webp; a picture of the engine takes its settings along."""
    buffer = BytesIO()
    if quality is None or kind == "png":
        image.save(buffer, kind)
    else:
        image.save(buffer, kind, quality=quality)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_base64(text: str, param: str, most_bytes: int) -> bytes:
    """The bytes of base64 text or of a data: URL; no other URL is ever read.

    Raises:
        Problem: a URL, or no base64, or too much of it.
    """
    if text.startswith(("http:", "https:", "file:", "ftp:")):
        raise Problem(f"{param} is a URL", needed="the picture itself, as base64", fix="send its bytes", param=param)
    if text.startswith("data:"):
        text = text.partition(",")[2]
    if len(text) > most_bytes * 4 // 3 + 4:
        raise too_large(param, most_bytes)
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise _undecodable(param, "no base64") from error


def too_large(param: str, most_bytes: int) -> Problem:
    """The refusal of a file that has too many bytes."""
    return Problem(
        f"{param} is too large",
        needed=f"at most {most_bytes} bytes",
        fix="send a smaller picture",
        param=param,
        status=413,
        code="image_too_large",
    )


def _decode(source: Source, size: tuple[int, int], latents: LatentSpec, most_pixels: int) -> tuple[Uint8, Uint8 | None]:
    image_name, mask_name = source.names
    picture = _loaded(source.image, image_name, most_pixels)
    mask = None if source.mask is None else _loaded(source.mask, mask_name, most_pixels)
    if mask is not None:
        if mask.size != picture.size:
            found, needed = (f"{side[0]}x{side[1]}" for side in (mask.size, picture.size))
            raise Problem(f"{mask_name} is {found}", needed=f"the picture's {needed}", fix="resize it", param=mask_name)
        mask = _whitened(mask, source)
    pixels, repaint = prepared(picture, mask, size[1], size[0], latents)
    return pixels, None if repaint is None else repaint.astype(np.uint8) * np.uint8(255)


def _whitened(mask: Image, source: Source) -> Image:
    """The mask in levels of grey, white where to repaint."""
    from PIL import ImageChops

    name = source.names[1]
    alpha = mask.getchannel("A") if "A" in mask.getbands() else None
    if source.mask_alpha:
        if alpha is None:
            raise Problem(
                f"{name} has no alpha", needed="a PNG whose alpha is 0 where to edit", fix="save it so", param=name
            )
        return ImageChops.invert(alpha)
    # A1111 takes the alpha of a mask that has some, and its brightness otherwise.
    grey = mask.convert("L") if alpha is None or alpha.getextrema() == (255, 255) else alpha
    return ImageChops.invert(grey) if source.mask_inverted else grey


def _loaded(file: Opener, param: str, most_pixels: int) -> Image:
    """Upright, with palettes and their transparency resolved. The file is closed: nobody needs it any more."""
    from PIL import ImageOps

    with file() as data:
        image = _opened(data, param, most_pixels)
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if "transparency" in upright.info:
                return upright.convert("RGBA")
            return upright if upright.mode in MODES else upright.convert("RGB")
        except Exception as error:  # what a decoder raises on broken input is not specified
            raise _undecodable(param, "damaged") from error


def _opened(data: BinaryIO, param: str, most_pixels: int) -> Image:
    """A file whose header was read; its size is checked before anything is decoded."""
    from PIL import Image

    try:
        image = Image.open(data, formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _undecodable(param, "too many pixels") from error
    except Exception as error:
        raise _undecodable(param, f"no {', '.join(FORMATS)}, or damaged") from error
    if image.width * image.height > most_pixels:
        raise _undecodable(param, f"{image.width}x{image.height} pixels, more than {most_pixels} in all")
    return image


def _undecodable(param: str, why: str) -> Problem:
    return Problem(
        f"{param} cannot be decoded: {why}",
        needed=f"a whole picture: {', '.join(FORMATS)}",
        fix="send another file",
        param=param,
        code="image_decode_failed",
    )
