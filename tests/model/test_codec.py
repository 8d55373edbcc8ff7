"""Several pictures are decoded together only where they are small, of one shape, and each core has one."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt.model.vae.codec import Encoded, decode_each

Float32 = NDArray[np.float32]


class Doubling:
    """A codec that notes how many pictures each call decodes."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def encode(self, image: Float32) -> Encoded:
        return Encoded(image)

    def decode(self, latents: Float32) -> Float32:
        self.counts.append(len(latents))
        return latents * 2


@pytest.mark.parametrize(
    ("sides", "cores", "counts"),
    [
        ([4] * 5, 1, [1, 1, 1, 1, 1]),
        ([4] * 5, 2, [2, 2, 1]),
        ([4] * 7, 4, [4, 1, 1, 1]),  # three would share operators, and take three pictures' memory
        ([4, 4, 6, 4, 4], 2, [2, 1, 2]),
        ([32] * 4, 4, [4]),
        ([33] * 4, 4, [1, 1, 1, 1]),
        ([64, 64], 2, [1, 1]),
        ([], 2, []),
    ],
)
def test_pictures_that_are_decoded_together(sides: list[int], cores: int, counts: list[int]) -> None:
    codec, latents = Doubling(), [np.full((4, side, side), i, np.float32) for i, side in enumerate(sides)]
    for given, found in zip(latents, list(decode_each(codec, latents, cores)), strict=True):
        np.testing.assert_array_equal(found, 2 * given)
    assert codec.counts == counts


def test_pictures_come_as_they_are_decoded() -> None:
    codec = Doubling()
    pictures = decode_each(codec, [np.zeros((4, 4, 4), np.float32)] * 6, 2)
    next(pictures)
    assert codec.counts == [2]
