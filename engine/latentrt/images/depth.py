"""Pictures of more than 8 bits a channel: scaled to 8. PIL's own conversion to L clips them, or cuts bits off.

| PIL mode, or array | white | what is refused |
| --- | --- | --- |
| I;16, I;16B, I;16L, I;16N; uint16 | 65535; 4095 in a TIFF file of 12 bits | |
| I | 65535, as PIL reads and writes PNG files in it | others; a largest value of 1 to 255, which may be of 8 bits |
| F | 1 | others than 0 to 1 |

PIL itself reads PNG files of 16 bits a channel in colour, or with alpha, as 8 bits: it keeps the upper ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

DEEP = ("I;16", "I;16B", "I;16L", "I;16N", "I", "F")
WHITE = 65_535
_BITS_PER_SAMPLE = 258  # a tag of TIFF files


def white_of(image: Image) -> int:
    """Return the value of white in a picture of 16 bits, as PIL opened it; a copy has lost what its file said."""
    tags = getattr(image, "tag_v2", {})
    return 4095 if image.mode == "I;16" and tags.get(_BITS_PER_SAMPLE) == (12,) else WHITE


def to_eight_bits(image: Image, name: str, white: int | None = None) -> Image:
    """Return a picture of a mode in DEEP as L, or as LA where its file names a transparent value; others as they are.

    Args:
        image: the picture.
        name: of the picture, for errors.
        white: the value of white in modes of 16 bits; None: see `white_of`.

    Raises:
        RequestError: values of the mode I or F that say no clear range.
    """
    from PIL import Image

    if image.mode not in DEEP:
        return image
    values = np.asarray(image)
    if image.mode in ("I", "F"):
        _check_range(values, image.mode, name)
        white = 1 if image.mode == "F" else WHITE
    grey = Image.fromarray(scaled(values, white_of(image) if white is None else white))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


def scaled(values: NDArray[Any], white: int = WHITE) -> NDArray[np.uint8]:
    """Return values from 0 to `white` as 0 to 255, rounded."""
    return np.rint(values * np.float64(255 / white)).astype(np.uint8)


def _check_range(values: NDArray[Any], mode: str, name: str) -> None:
    low, high = (float(each) for each in (values.min(), values.max()))
    found = f"the {name} has the mode {mode} with values from {low:g} to {high:g}"
    white = 1 if mode == "F" else WHITE
    if not (low >= 0 and high <= white):  # NaN too
        raise RequestError(found, needed=f"0 to {white}", fix='scale it, or image.convert("L") if white is 255')
    if mode == "I" and 0 < high <= 255:
        fix = 'image.convert("L") if white is 255, image.convert("I;16") if it is 65535'
        raise RequestError(f"{found}, which may be of 8 bits or of 16", needed="a mode that says it", fix=fix)
