"""Ways to bring a picture to a size, against diffusers' image processor, whose ways are A1111's."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.resize import resized

PROCESSOR = VaeImageProcessor()
THEIRS = {"stretch": "default", "crop": "crop", "fill": "fill"}
SIZE = (64, 48)
sides = st.integers(4, 100)


@settings(deadline=None, max_examples=60)
@given(width=sides, height=sides, way=st.sampled_from(list(THEIRS)), size=st.sampled_from([SIZE, (48, 64), (64, 64)]))
def test_pictures_are_those_of_diffusers(width: int, height: int, way: str, size: tuple[int, int]) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))
    theirs = PROCESSOR.resize(picture, size[1], size[0], THEIRS[way])
    np.testing.assert_array_equal(np.asarray(resized(picture, size, way)), np.asarray(theirs))


@pytest.mark.parametrize("turned", [False, True])
def test_what_is_cut_and_what_is_added(turned: bool) -> None:
    """Of a picture twice as wide as high, its middle; or all of it, between bands that go on as 9/8 less 1/8."""
    pixels = np.arange(40, 72, dtype=np.uint8)[:, None].repeat(64, axis=1)
    picture = Image.fromarray(pixels.T if turned else pixels)
    cut, added = (np.asarray(resized(picture, (64, 64), way)) for way in ("crop", "fill"))
    cut, added = (one.T if turned else one for one in (cut, added))
    twice = np.asarray(Image.fromarray(pixels).resize((128, 64), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(cut, twice[:, 32:96])
    np.testing.assert_array_equal(added[16:48], pixels)
    assert set(added[:16].flat) == {round(40 * 9 / 8 - 41 / 8)}
    assert set(added[48:].flat) == {round(71 * 9 / 8 - 70 / 8)}


def test_strips_are_refused_and_narrow_pictures_are_not() -> None:
    strip, narrow = Image.new("RGB", (1, 16_000)), Image.new("RGB", (1, 90), "red")
    for way in ("crop", "fill"):
        with pytest.raises(RequestError, match="the picture is 1x16000, and brought to 64x64"):
            resized(strip, (64, 64), way)
        assert resized(narrow, (64, 64), way).getpixel((20, 30)) == (255, 0, 0)
    assert resized(strip, (64, 64)).size == (64, 64)
