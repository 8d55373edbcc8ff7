"""Pictures as CLIP's image encoders read them: transformers' CLIPImageProcessor, in Pillow and numpy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from latentrt.images.given import in_rgb
from latentrt.images.resize import check_proportions

if TYPE_CHECKING:
    from latentrt.images.given import Source

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # of CLIP's training pictures, in 0..1
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def clip_pixels(image: Source | Any, size: int) -> NDArray[np.float32]:
    """Return the middle of a picture, normalised: its shorter side is resized to the size first.

    Args:
        image: a PIL image, or a uint8 or uint16 array (height, width, 3), or (height, width) of grey. Transparent parts
            become white.
        size: of a side, in pixels.

    Returns:
        (3, size, size) float32.

    Raises:
        RequestError: a kind or mode that cannot be used, or a strip.
    """
    from PIL import Image

    picture = in_rgb(image, "image prompt")
    check_proportions(picture, (size, size), "image prompt")
    short, long = sorted(picture.size)
    other = int(size * long / short)
    width, height = (size, other) if picture.width <= picture.height else (other, size)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    values = np.asarray(resized.crop((left, top, left + size, top + size)), np.float32) / np.float32(255)
    return np.ascontiguousarray(((values - MEAN) / DEVIATION).transpose(2, 0, 1))
