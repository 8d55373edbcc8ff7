"""Maps for ControlNets: edges where a picture has them, and OpenCV's own."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.given import prepared_hint
from latentrt.images.hints import blurred, edges, grey, inverted, masked
from latentrt.images.inpaint import Overlay

y, x = np.mgrid[:48, :64]
DISC = np.where(np.hypot(x - 30, y - 22) < 15, 220, 30).astype(np.uint8)


def test_edges_are_the_border_and_nothing_else() -> None:
    found = np.asarray(edges(Image.fromarray(DISC)))
    assert set(np.unique(found)) == {0, 255}
    distance = np.abs(np.hypot(x - 30, y - 22) - 15)
    assert distance[found == 255].max() < 1.5
    angles = np.arctan2(y - 22, x - 30)[found == 255]
    assert np.diff(np.sort(angles)).max() < 0.2  # all around
    assert (found == 255).sum() < 1.5 * 2 * np.pi * 15  # one pixel wide


def test_a_weak_edge_is_kept_where_it_touches_a_strong_one() -> None:
    ramp = np.zeros((20, 40), np.uint8)
    ramp[10:] = np.linspace(20, 90, 40).astype(np.uint8)  # gradients of 80 to 360
    whole, strong = (np.asarray(edges(Image.fromarray(ramp), low, 200)).any(axis=0) for low in (100, 200))
    assert whole[8:].all()
    assert not strong[:14].any()
    assert not np.asarray(edges(Image.fromarray(ramp), 100, 400)).any()
    with pytest.raises(RequestError, match="low is 300 and high 200"):
        edges(Image.fromarray(ramp), 300, 200)


def test_edges_are_those_of_opencv() -> None:
    noise = np.random.default_rng(0).uniform(0, 255, (60, 80)).astype(np.uint8)
    soft = np.asarray(blurred(Image.fromarray(noise), 2.0).convert("L"))
    for picture in (DISC, noise, soft):
        for low, high in ((100, 200), (20, 60.5)):
            expected = cv2.Canny(picture, low, high)
            np.testing.assert_array_equal(np.asarray(edges(Image.fromarray(picture), low, high)), expected)


def test_a_masked_picture_is_taken_as_it_is() -> None:
    colours, mask = (
        Image.fromarray(np.stack([DISC] * 3, axis=-1)),
        Image.fromarray(np.where(x < 20, 255, 0).astype(np.uint8)),
    )
    found = masked(colours, mask)
    assert (found[:, :20] == -1).all()
    np.testing.assert_array_equal(found[:, 20:], np.asarray(colours, np.float32)[:, 20:] / np.float32(255))
    np.testing.assert_array_equal(prepared_hint(found, 48, 64), found.transpose(2, 0, 1))
    with pytest.raises(RequestError, match=r"floats is 64x48\. Needed: 32x48, as the run"):
        prepared_hint(found, 48, 32)
    with pytest.raises(RequestError, match="the mask is 64x48 and the picture 32x32"):
        masked(colours.resize((32, 32)), mask)


@pytest.mark.parametrize("box", [(10, 6, 34, 22), (3, 5, 51, 45), None])
def test_a_map_of_a_part_of_the_picture(box: tuple[int, int, int, int] | None) -> None:
    """As the control image of diffusers' ControlNet inpainting with padding_mask_crop."""
    picture, colours = Image.new("RGB", (64, 48)), Image.fromarray(np.stack([DISC, x, y], axis=-1).astype(np.uint8))
    processor = VaeImageProcessor(vae_scale_factor=8, do_convert_rgb=True, do_normalize=False)
    mode = "default" if box is None else "fill"
    expected = processor.preprocess(colours, height=32, width=48, crops_coords=box, resize_mode=mode)
    found = prepared_hint(colours, 32, 48, Overlay(picture, picture.convert("L"), box))
    np.testing.assert_allclose(found, expected[0].numpy(), atol=1e-6)


def test_other_maps() -> None:
    colours = Image.fromarray(np.stack([DISC, DISC // 2, 255 - DISC], axis=-1))
    assert (grey(colours).mode, inverted(colours).mode) == ("L", "L")
    np.testing.assert_array_equal(np.asarray(inverted(grey(colours))), 255 - np.asarray(grey(colours)))
    soft = np.asarray(blurred(colours, 3.0), np.float64)
    assert soft.std() < np.asarray(colours).std()
    assert abs(soft.mean() - np.asarray(colours).mean()) < 2
