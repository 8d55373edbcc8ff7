"""A part of a picture that is repainted: the mask's soft edge, the region that is drawn, what fills it, how it returns.

Sources of the definitions: diffusers' `padding_mask_crop` and its mask processor's `blur` and `apply_overlay`, whose
pictures these are; the "Masked content" and "Only masked" of AUTOMATIC1111's web UI, which name the fills.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.pixels import to_pil
from latentrt.images.resize import Size, covering

if TYPE_CHECKING:
    from PIL.Image import Image

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]  # left, top, right, bottom
_RADII = (256, 64, 16, 4)  # of a fill, coarse to fine


@dataclass(frozen=True, slots=True)
class Overlay:
    """A given picture that is laid over the drawn one wherever it is not repainted.

    Attributes:
        picture: RGB, or L of models that draw grey.
        area: L, of its size: 255 where the drawn picture shows, 0 where this one does.
        box: where in it the drawn picture belongs; None: all of it.
    """

    picture: Image
    area: Image
    box: Box | None = None

    def on(self, pixels: Pixels) -> Pixels:
        """Return drawn pixels, (height, width, channels), with this picture over them and of its size."""
        from PIL import Image

        drawn, ground = to_pil(pixels), self.picture.copy()
        if self.box is None:
            ground = drawn
        else:
            left, top, right, bottom = self.box
            ground.paste(covering(drawn, (right - left, bottom - top)), (left, top))
        return np.asarray(Image.composite(ground, self.picture, self.area)).reshape(*ground.size[::-1], -1)


def blurred(area: Image, sigma: float) -> Image:
    """Return a mask with a soft edge, as `VaeImageProcessor.blur` makes it."""
    from PIL import ImageFilter

    return area.filter(ImageFilter.GaussianBlur(sigma)) if sigma else area


def doubled(area: Image) -> Image:
    """Return a mask of twice the values, which shows half of a soft edge in full."""
    return area.point(lambda value: min(255, 2 * value))


def region(area: Image, padding: int, size: Size) -> Box:
    """Return the box around what a mask repaints, padded, then widened to the proportions of a size where it can be.

    Raises:
        RequestError: the mask repaints nothing.
    """
    values = np.asarray(area)
    rows, columns = (np.flatnonzero(values.any(axis=axis)) for axis in (1, 0))
    if not len(rows):
        raise RequestError("the mask repaints nothing", needed="white where to repaint", fix="invert the mask")
    left, top = max(columns[0] - padding, 0), max(rows[0] - padding, 0)
    right, bottom = min(columns[-1] + 1 + padding, area.width), min(rows[-1] + 1 + padding, area.height)
    proportions = size[0] / size[1]
    if (right - left) / (bottom - top) > proportions:
        top, bottom = _widened(top, bottom, int((right - left) / proportions), area.height)
    else:
        left, right = _widened(left, right, int((bottom - top) * proportions), area.width)
    return int(left), int(top), int(right), int(bottom)


def _widened(low: int, high: int, length: int, limit: int) -> tuple[int, int]:
    """Return an interval with another length around the same middle, moved and cut to lie within 0..limit."""
    low -= (length - (high - low)) // 2
    low = max(0, min(low, limit - length))
    return low, min(low + length, limit)


def filled(picture: Image, area: Image) -> Image:
    """Return a picture whose repainted part has the colours around it: blurs of the rest, finer where it is near.

    Args:
        picture: RGB or L.
        area: L, of its size: 255 is replaced, 0 stays.
    """
    from PIL import Image, ImageChops, ImageFilter

    rest = ImageChops.invert(area)
    black = Image.new(picture.mode, picture.size)
    shown = Image.composite(picture, black, rest)
    weight = np.asarray(rest, np.float64).sum()
    made = np.asarray(shown, np.float64)
    ground = np.full_like(made, made.sum(axis=(0, 1)) * 255 / weight if weight else 127.5)
    for radius in _RADII:
        blur = ImageFilter.GaussianBlur(radius)
        share = np.asarray(rest.filter(blur), np.float64).reshape(*made.shape[:2], *(1,) * (made.ndim - 2)) / 255
        colour = np.asarray(shown.filter(blur), np.float64) / np.maximum(share, 1 / 255)
        ground += np.minimum(1, 4 * share) * (colour.clip(0, 255) - ground)
    return Image.composite(Image.fromarray(ground.round().astype(np.uint8)), picture, area)
