"""Maps for ControlNets: edges where a picture has them, and with OpenCV's where it is installed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from latentrt.errors import RequestError
from latentrt.images.hints import blurred, edges, grey, inverted

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
    cv2 = pytest.importorskip("cv2")
    noise = np.random.default_rng(0).uniform(0, 255, (60, 80)).astype(np.uint8)
    for picture in (DISC, noise):
        np.testing.assert_array_equal(np.asarray(edges(Image.fromarray(picture))), cv2.Canny(picture, 100, 200))


def test_other_maps() -> None:
    colours = Image.fromarray(np.stack([DISC, DISC // 2, 255 - DISC], axis=-1))
    assert (grey(colours).mode, inverted(colours).mode) == ("L", "L")
    np.testing.assert_array_equal(np.asarray(inverted(grey(colours))), 255 - np.asarray(grey(colours)))
    soft = np.asarray(blurred(colours, 3.0), np.float64)
    assert soft.std() < np.asarray(colours).std()
    assert abs(soft.mean() - np.asarray(colours).mean()) < 2
