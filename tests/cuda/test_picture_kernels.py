"""The kernels between latents, the VAE and pixels: to the last bit as numpy has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.cuda import kernels
from latentrt.images.pixels import to_uint8
from tests.support.gpu.host_gpu import HostGpu, host_gpu
from tests.support.gpu.rig import SHAPE

HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
FEW = settings(deadline=None, max_examples=25)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_to_latents(gpu: HostGpu, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32) * np.float32(9)
    source, target = gpu.empty(x.shape, np.float32), gpu.empty(x.shape, dtype)
    gpu.upload(x, source)
    kernels.to_latents(gpu, source, target, 0.13025, 0.25)
    expected = (x / np.float32(0.13025) + np.float32(0.25)).astype(dtype)
    np.testing.assert_array_equal(gpu.download(target), expected)
    gpu.free(source)
    gpu.free(target)


@given(st.lists(st.floats(width=32), min_size=1, max_size=300))
@FEW
def test_halves_are_rounded_as_numpy_does(values: list[float]) -> None:
    """The emulation's own conversion; on the GPU it is one instruction."""
    numbers = np.array([*values, *HALVES[:: 2**8], 65519.9, 65520, 2**-25, 2**-24 * 1.5], np.float32)
    with host_gpu() as gpu, np.errstate(all="ignore"):
        source, target = gpu.empty(numbers.shape, np.float32), gpu.empty(numbers.shape, np.float16)
        gpu.upload(numbers, source)
        kernels.to_latents(gpu, source, target, 1, 0)
        np.testing.assert_array_equal(gpu.download(target), (numbers + np.float32(0)).astype(np.float16))
        gpu.free(source)
        gpu.free(target)


def pixels_of(gpu: HostGpu, image: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    count, _, height, width = image.shape
    source, target = gpu.empty(image.shape, image.dtype), gpu.empty((count, height, width, 3), np.uint8)
    bad = gpu.zeros((count,), np.int32)
    gpu.upload(image, source)
    kernels.to_pixels(gpu, source, target, bad)
    results = gpu.download(target), gpu.download(bad)
    for array in (source, target, bad):
        gpu.free(array)
    return results


def test_every_half_becomes_the_same_pixel_as_in_numpy(gpu: HostGpu) -> None:
    finite = np.where(np.isfinite(HALVES), HALVES, np.float16(0))
    image = np.resize(finite, (2, 3, 128, 256)).astype(np.float16)
    pixels, bad = pixels_of(gpu, image)
    np.testing.assert_array_equal(pixels, to_uint8(image))
    assert bad.tolist() == [0, 0]


def test_ties_are_rounded_to_even(gpu: HostGpu) -> None:
    middles = np.float32(2 * (np.arange(255) + 0.5) / 255 - 1)
    near = (middles[:, None] + np.arange(-8, 9, dtype=np.float32) * np.float32(2**-24)).reshape(1, 3, 85, 17)
    scaled = (near * np.float32(0.5) + np.float32(0.5)) * np.float32(255)
    assert (scaled % 1 == 0.5).sum() > 300
    np.testing.assert_array_equal(pixels_of(gpu, near)[0], to_uint8(near))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_that_are_not_finite_are_told_apart(gpu: HostGpu, value: float) -> None:
    image = np.linspace(-1.2, 1.2, 3 * 3 * 5 * 7, dtype=np.float32).reshape(3, 3, 5, 7)
    spoiled = image.copy()
    spoiled[1, 2, 4, 6] = value
    pixels, bad = pixels_of(gpu, spoiled)
    assert bad.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(pixels[[0, 2]], to_uint8(image)[[0, 2]])
