"""Pixels as arrays, against diffusers' image processor."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor

from latentrt.errors import NetworkError, RequestError
from latentrt.images.pixels import from_uint8, to_pil, to_uint8

SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]


def test_every_pixel_value_survives_the_way_to_the_latents_range_and_back() -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    np.testing.assert_array_equal(to_uint8(from_uint8(pixels)), pixels)


def test_to_uint8_is_diffusers_bit_for_bit() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0, 0.7, (2, 3, 32, 48)).astype(np.float32)
    x[0, 0].flat[:512] = (np.arange(512, dtype=np.float32) + 0.5) / 255 - 1  # near the roundings' edges
    wanted = VaeImageProcessor().postprocess(torch.from_numpy(x), output_type="pil")
    for found, image in zip(to_uint8(x), wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(to_pil(found)), np.asarray(image))


def test_grey_pictures_are_grey_images() -> None:
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(1, 1, 4, 8)
    (wanted,) = VaeImageProcessor().postprocess(torch.from_numpy(x), output_type="pil")
    found = to_pil(to_uint8(x)[0])
    assert (found.mode, wanted.mode) == ("L", "L")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_from_uint8_is_diffusers_bit_for_bit() -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
    wanted = VaeImageProcessor().preprocess([to_pil(one) for one in pixels]).numpy()
    found = from_uint8(pixels)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_decoder_output_is_never_a_black_picture(value: float) -> None:
    x = np.zeros((1, 3, 4, 4), np.float32)
    x[0, 1, 2, 3] = value
    with pytest.raises(NetworkError, match="1 of 48"):
        to_uint8(x)


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 4, 4, 3), (1, 2, 4, 4)])
def test_to_uint8_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(NetworkError, match="shape"):
        to_uint8(np.zeros(shape, np.float32))


@pytest.mark.parametrize("pixels", [np.zeros((4, 4, 3), np.uint8), np.zeros((1, 4, 4, 3), np.float32)])
def test_from_uint8_refuses_other_pixels(pixels: np.ndarray) -> None:
    with pytest.raises(RequestError, match="pixels of shape"):
        from_uint8(pixels)
