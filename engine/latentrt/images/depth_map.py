"""Depth maps: read as they are, and brought to the latents' size.

Source: `prepare_depth_map` of diffusers' StableDiffusionDepth2ImgPipeline.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.depth import DEEP

if TYPE_CHECKING:
    from PIL.Image import Image

Float32 = NDArray[np.float32]
NEEDED = "a grey PIL image, or an array (height, width) of uint8, uint16 or floats; near is white"
A = -0.75  # of the cubic kernel (Keys 1981), as torch has it


def depth_of(source: Any) -> Float32:
    """Return a depth map's values (height, width), of any scale.

    Args:
        source: a PIL image, also of more than 8 bits, or an array (height, width) of uint8, uint16 or floats.

    Raises:
        RequestError: another kind, colours, transparent pixels, or numbers that are not finite.
    """
    from PIL import Image

    values = _grey(source) if isinstance(source, Image.Image) else source
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "uif" or not values.size:
        kind = f"{values.dtype} {values.shape}" if isinstance(values, np.ndarray) else type(values).__name__
        raise RequestError(f"the depth map is {kind}", needed=NEEDED)
    depth: Float32 = values.astype(np.float32)
    if not np.isfinite(depth).all():
        raise RequestError("the depth map has numbers that are not finite", needed=NEEDED)
    return depth


def relative(depth: Float32, size: tuple[int, int]) -> Float32:
    """Return a depth map (1, *size) in -1..1: resized by a bicubic filter, its least value -1 and its largest 1.

    Raises:
        RequestError: all values are the same.
    """
    resized = _resized(_resized(depth, size[0]).T, size[1]).T
    low, high = resized.min(), resized.max()
    if not low < high:
        raise RequestError("the depth map has the same value everywhere", needed=NEEDED)
    unit: Float32 = (resized - low) / (high - low)
    return (np.float32(2) * unit - np.float32(1))[None]


def _grey(picture: Image) -> NDArray[Any]:
    if picture.mode in DEEP:
        return np.asarray(picture)
    if picture.has_transparency_data and np.asarray(picture.convert("RGBA"))[..., 3].min() < 255:
        raise RequestError("the depth map has transparent pixels", needed=NEEDED, fix="flatten it")
    colours = np.asarray(picture.convert("RGB"))
    if (colours != colours[..., :1]).any():
        raise RequestError("the depth map has colours", needed=NEEDED, fix="take the map before it was coloured")
    return colours[..., 0]


def _resized(values: Float32, count: int) -> Float32:
    """Return an array with `count` rows: torch's bicubic interpolation, align_corners false, without antialiasing."""
    rows = len(values)
    place = (np.arange(count) + 0.5) * (rows / count) - 0.5
    first = np.floor(place)
    result = np.zeros((count, values.shape[1]), np.float32)
    for tap in (-1, 0, 1, 2):
        index = np.clip(first + tap, 0, rows - 1).astype(np.int64)
        result += _cubic(np.abs(place - first - tap)).astype(np.float32)[:, None] * values[index]
    return result


def _cubic(distance: NDArray[np.float64]) -> NDArray[np.float64]:
    near = ((A + 2) * distance - (A + 3)) * distance**2 + 1
    far = ((A * distance - 5 * A) * distance + 8 * A) * distance - 4 * A
    return np.where(distance <= 1, near, far)
