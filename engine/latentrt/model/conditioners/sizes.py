"""SDXL's size input: the picture's size and crop; its refiner's also has an aesthetic score."""

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
        size = self._latents.pixels_of(request.height, request.width)
        return Sides.same({"time_ids": np.array([*size, 0, 0, *size], np.float32)})


class ScoredSizes(Conditioner):
    """Fills "time_ids" (5,) of the refiner: original size, crop corner and aesthetic score, another for each lane.

    Source: diffusers' StableDiffusionXLImg2ImgPipeline with requires_aesthetics_score.
    """

    inputs = ("time_ids",)
    fields = ("aesthetic_score", "negative_aesthetic_score")
    pictures = ("image",)
    NUMBERS = (*Sizes.NUMBERS[:4], "aesthetic score")
    DEFAULTS = 6.0, 2.5  # of the prompt's lane, and of the other one

    def __init__(self, latents: LatentSpec) -> None:
        self._latents = latents

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        size = self._latents.pixels_of(request.height, request.width)
        asked = request.aesthetic_score, request.negative_aesthetic_score
        cond, uncond = (
            {"time_ids": np.array([*size, 0, 0, own if score is None else score], np.float32)}
            for score, own in zip(asked, self.DEFAULTS, strict=True)
        )
        return Sides(uncond, cond)
