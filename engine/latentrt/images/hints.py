"""Maps for ControlNets that need no network: edges, grey, blurred and masked pictures, drawings with white lines.

Depth maps, poses and the like come from networks of their own, which are not part of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.given import WHITE

if TYPE_CHECKING:
    from PIL.Image import Image

Float = NDArray[np.float64]
TANGENTS = np.tan(np.pi / 8), np.tan(3 * np.pi / 8)  # between across, diagonal and upright


def edges(picture: Image, low: float = 100.0, high: float = 200.0) -> Image:
    """Return a picture's edges, white on black, one pixel wide.

    Args:
        picture: any PIL image.
        low, high: sizes of the gradient, |dx| + |dy| of Sobel's filters on grey values of 0 to 255: above `high` an
            edge begins, and goes on where it is above `low`.

    Raises:
        RequestError: `low` is above `high`.

    Source:
        Canny 1986, "A Computational Approach to Edge Detection", without its first blur, as OpenCV's Canny.
    """
    from PIL import Image

    if low > high:
        raise RequestError(f"low is {low:g} and high {high:g}", needed="low at most as large as high")
    across, down = _gradients(np.asarray(picture.convert("L"), np.float64))
    size = np.abs(across) + np.abs(down)
    ridge = _is_ridge(size, across, down)
    found = _grown(ridge & (size > high), ridge & (size > low))
    return Image.fromarray(found.astype(np.uint8) * np.uint8(255))


def grey(picture: Image) -> Image:
    """Return a picture's luma, for ControlNets that give grey pictures their colours back."""
    return picture.convert("L")


def blurred(picture: Image, radius: float = 4.0) -> Image:
    """Return a picture without its details, for ControlNets that draw them anew (tile, blur).

    Args:
        picture: any PIL image.
        radius: the standard deviation of the Gaussian in pixels.
    """
    from PIL import ImageFilter

    return picture.convert("RGB").filter(ImageFilter.GaussianBlur(radius))


def inverted(picture: Image) -> Image:
    """Return a drawing of dark lines on white as white lines on black, as ControlNets for scribbles read it."""
    from PIL import ImageOps

    return ImageOps.invert(picture.convert("L"))


def masked(picture: Image, mask: Image) -> NDArray[np.float32]:
    """Return a picture without what is to be repainted, for ControlNets that inpaint.

    Args:
        picture: any PIL image of the run's size.
        mask: of the same size, white where to repaint.

    Returns:
        RGB (height, width, 3), float32 in 0..1, and -1 where to repaint.

    Raises:
        RequestError: the sizes differ.

    Source:
        The card of lllyasviel/control_v11p_sd15_inpaint, which diffusers' documentation repeats.
    """
    if picture.size != mask.size:
        found = f"the mask is {mask.width}x{mask.height} and the picture {picture.width}x{picture.height}"
        raise RequestError(found, needed="one size", fix="resize the mask")
    values = np.asarray(picture.convert("RGB"), np.float32) / np.float32(255)
    values[np.asarray(mask.convert("L")) >= WHITE] = -1
    return values


def _gradients(values: Float) -> tuple[Float, Float]:
    """Return Sobel's derivatives across and down, (height, width) each; the border is repeated."""
    padded = np.pad(values, 1, mode="edge")
    height, width = values.shape
    near = {(i, j): padded[i : i + height, j : j + width] for i in range(3) for j in range(3)}
    across = sum(weight * (near[i, 2] - near[i, 0]) for i, weight in enumerate((1, 2, 1)))
    down = sum(weight * (near[2, j] - near[0, j]) for j, weight in enumerate((1, 2, 1)))
    return np.asarray(across), np.asarray(down)


def _is_ridge(size: Float, across: Float, down: Float) -> NDArray[np.bool_]:
    """Return where the gradient is the largest on the line along which it points: of two equal ones, the first."""
    height, width = size.shape
    padded = np.pad(size, 1)

    def at(i: int, j: int) -> Float:
        return padded[1 + i : 1 + i + height, 1 + j : 1 + j + width]

    steep = np.abs(down)
    flat, upright = steep < TANGENTS[0] * np.abs(across), steep > TANGENTS[1] * np.abs(across)
    same = (across < 0) == (down < 0)
    before = np.where(flat, at(0, -1), np.where(upright, at(-1, 0), np.where(same, at(-1, -1), at(-1, 1))))
    after = np.where(flat, at(0, 1), np.where(upright, at(1, 0), np.where(same, at(1, 1), at(1, -1))))
    diagonal = ~flat & ~upright
    return np.asarray((size > before) & np.where(diagonal, size > after, size >= after))


def _grown(seeds: NDArray[np.bool_], allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the allowed pixels that touch the seeds, over neighbours in eight directions."""
    found, height, width = seeds, *seeds.shape
    while True:
        padded = np.pad(found, 1)
        near = [padded[i : i + height, j : j + width] for i in range(3) for j in range(3)]
        grown = np.logical_or.reduce(near) & allowed
        if np.array_equal(grown, found):
            return found
        found = grown
