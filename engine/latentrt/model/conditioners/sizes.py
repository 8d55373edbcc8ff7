"""SDXL's size input: the picture's size and crop."""

from __future__ import annotations

import numpy as np

from latentrt.bundle.spec import LatentSpec
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource


class Sizes(Conditioner):
    """Fills "time_ids" (6,): original size, crop corner and target size, in pixels, float32 (Podell et al. 2023)."""

    inputs = ("time_ids",)
    NUMBERS = ("original height", "original width", "crop top", "crop left", "target height", "target width")

    def __init__(self, latents: LatentSpec) -> None:
        self._latents = latents

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        height, width = self._latents.pixels_of(request.height, request.width)
        return Sides.same({"time_ids": np.array([height, width, 0, 0, height, width], np.float32)})
