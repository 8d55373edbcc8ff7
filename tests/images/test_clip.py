"""Pictures as CLIP's image encoders read them, against transformers' processor."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from latentrt.errors import RequestError
from latentrt.images.clip import clip_pixels

PIXELS = np.random.default_rng(0).integers(0, 256, (90, 131, 3), np.uint8)


@pytest.mark.parametrize("size", [(131, 90), (61, 90), (224, 224), (30, 20), (223, 225), (7, 90)])
def test_pixels_are_those_of_the_processor(size: tuple[int, int]) -> None:
    picture = Image.fromarray(PIXELS).resize(size)
    expected = CLIPImageProcessorPil(size=56, crop_size=56)(picture, return_tensors="np").pixel_values[0]
    for image in (picture, np.asarray(picture), picture.convert("RGBA")):
        np.testing.assert_allclose(clip_pixels(image, 56), expected, rtol=0, atol=1e-6)


def test_grey_and_deep_arrays() -> None:
    grey = np.asarray(Image.fromarray(PIXELS).convert("L"))
    expected = clip_pixels(Image.fromarray(grey), 32)
    np.testing.assert_array_equal(clip_pixels(grey, 32), expected)
    np.testing.assert_array_equal(clip_pixels(grey.astype(np.uint16) * 257, 32), expected)
    with pytest.raises(RequestError, match="the image prompt is float64"):
        clip_pixels(grey / 255, 32)
    with pytest.raises(RequestError, match=r"is 2x300, and brought to 32x32. Needed: one at most 100 times"):
        clip_pixels(np.zeros((300, 2), np.uint8), 32)
