"""What of a picture is drawn and how it returns, against diffusers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.inpaint import Overlay, blurred, doubled, filled, region
from latentrt.images.resize import fitted
from latentrt_export.verify.checks import psnr
from tests.model.test_edit import mask_for, picture

PROCESSOR = VaeImageProcessor()
sides = st.integers(1, 60)


def spot(width: int, height: int, box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (width, height))
    mask.paste(255, box)
    return mask


@settings(deadline=None, max_examples=200)
@given(width=sides, height=sides, corner=st.tuples(sides, sides), padding=st.integers(0, 9), data=st.data())
def test_the_region_is_that_of_diffusers(
    width: int, height: int, corner: tuple[int, int], padding: int, data: st.DataObject
) -> None:
    left, top = corner[0] % width, corner[1] % height
    right = data.draw(st.integers(left + 1, width))
    bottom = data.draw(st.integers(top + 1, height))
    size = data.draw(st.sampled_from([(64, 64), (96, 32), (24, 80)]))
    mask = spot(width, height, (left, top, right, bottom))
    box = region(mask, padding, size)
    assert 0 <= box[0] < box[2] <= width
    assert 0 <= box[1] < box[3] <= height
    assert box == tuple(PROCESSOR.get_crop_region(mask, *size, pad=padding))


@pytest.mark.parametrize(("width", "height"), [(64, 64), (96, 40), (24, 80)])
@pytest.mark.parametrize("box", [(30, 40, 70, 90), (0, 0, 133, 20), (5, 0, 15, 131)])
def test_a_region_is_fitted_and_returns_as_in_diffusers(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    image = picture()
    ours = fitted(image.crop(box), (width, height))
    theirs = PROCESSOR._resize_and_fill(image.crop(box), width=width, height=height)
    assert ours.size == (width, height)
    assert psnr(np.asarray(ours), np.asarray(theirs)) > 40  # it interpolates what repeats the edges
    mask, drawn = Image.new("L", image.size), picture(width, height).transpose(Image.Transpose.ROTATE_180)
    mask.paste(blurred(mask_for(image), 3).crop(box), box)
    put = Overlay(image, mask, box).on(np.asarray(drawn))
    assert psnr(put, np.asarray(PROCESSOR.apply_overlay(mask, image, drawn, box))) > 45
    np.testing.assert_array_equal(put[np.asarray(mask) == 0], np.asarray(image)[np.asarray(mask) == 0])


def test_a_whole_picture_returns_as_in_diffusers() -> None:
    image, drawn = picture(), picture().transpose(Image.Transpose.ROTATE_180)
    mask = blurred(mask_for(image), 4)
    np.testing.assert_array_equal(np.asarray(mask), np.asarray(PROCESSOR.blur(mask_for(image), 4)))
    ours, theirs = Overlay(image, mask).on(np.asarray(drawn)), PROCESSOR.apply_overlay(mask, image, drawn)
    np.testing.assert_allclose(ours.astype(int), np.asarray(theirs, int), atol=1)
    assert doubled(mask).getextrema() == (0, 255)
    grey = Overlay(image.convert("L"), mask).on(np.asarray(drawn.convert("L"))[..., None])
    assert grey.shape == (131, 133, 1)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_fill_has_the_colours_around(mode: str) -> None:
    """Left of the mask's middle red is nearer, right of it blue; what is not masked stays to the bit."""
    image = Image.new(mode, (80, 40), "red")
    image.paste("blue", (40, 0, 80, 40))
    image.paste("lime", (25, 10, 55, 30))
    mask = spot(80, 40, (25, 10, 55, 30))
    made, rest = np.asarray(filled(image, mask), int), np.asarray(mask) == 0
    np.testing.assert_array_equal(made[rest], np.asarray(image)[rest])
    left, right = made[20, 28], made[20, 52]
    if mode == "RGB":
        assert left[0] > left[2] + 50
        assert right[2] > right[0] + 50
        assert made[..., 1].max() == 0
    assert np.asarray(filled(image, Image.new("L", image.size, 255))).shape == np.asarray(image).shape


def test_an_empty_mask_has_no_region() -> None:
    with pytest.raises(RequestError, match="the mask repaints nothing"):
        region(Image.new("L", (8, 8)), 2, (64, 64))
