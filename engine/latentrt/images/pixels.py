"""Pixels as arrays: as networks read and return them, and as files hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import NetworkError, RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.metadata import Settings
    from latentrt.images.picture import Picture

CHANNELS = (1, 3)  # grey, RGB


def to_uint8(x: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """Return decoded pictures (N, channels, H, W) in [-1, 1] as pixels (N, H, W, channels), rounded as in diffusers.

    Raises:
        NetworkError: another shape, or a number that is not finite (it would show as a black picture).
    """
    if x.ndim != 4 or x.shape[1] not in CHANNELS:
        raise NetworkError(f"a decoded array of shape {x.shape}", needed="(N, 3, H, W), or (N, 1, H, W) for grey")
    bad = np.count_nonzero(~np.isfinite(x))
    if bad:
        raise NetworkError(
            f"{bad} of {x.size} decoded numbers are NaN or infinite",
            needed="finite pixels",
            fix="run the VAE decoder in float32: its activations can overflow float16",
        )
    unit = (x.astype(np.float32, copy=False) * np.float32(0.5) + np.float32(0.5)).clip(0, 1)
    return (unit.transpose(0, 2, 3, 1) * np.float32(255)).round().astype(np.uint8)


def from_uint8(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return pixels (N, H, W, channels) as float32 (N, channels, H, W) in [-1, 1], as diffusers' VaeImageProcessor.

    Raises:
        RequestError: another shape or dtype.
    """
    if pixels.ndim != 4 or pixels.shape[3] not in CHANNELS or pixels.dtype != np.uint8:
        raise RequestError(
            f"pixels of shape {pixels.shape} and dtype {pixels.dtype}",
            needed="uint8 of shape (N, H, W, 3), or (N, H, W, 1) for grey",
            fix='convert pictures first: np.asarray(image.convert("RGB"))[None]',
        )
    unit = pixels.transpose(0, 3, 1, 2).astype(np.float32, order="C") / np.float32(255)
    return np.float32(2) * unit - np.float32(1)


def to_pil(pixels: NDArray[np.uint8]) -> Image:
    """Return pixels (H, W, channels) as a PIL image: RGB, or grey (L) where there is one channel."""
    from PIL import Image

    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)


def to_picture(pixels: NDArray[np.uint8], settings: Settings) -> Picture:
    """Return pixels (H, W, channels) as a PIL image that knows its settings."""
    from latentrt.images.picture import Picture

    return Picture.of(pixels, settings)
