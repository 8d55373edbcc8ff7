"""The picture to enlarge, beside the latents. Source: diffusers' StableDiffusionUpscalePipeline."""

from __future__ import annotations

import numpy as np

from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.schedule import Schedule

NOISE_LEVEL = 20  # diffusers' own default


class LowPicture(Conditioner):
    """Fills "low_picture" (3, height, width), of the latents' size, and "noise_level" (), a timestep.

    The picture gets as much noise as its own schedule has at that timestep, drawn before the first latents' noise.

    Args:
        factor: pixels a side of each latent.
        schedule: of that noise.
        most: the largest noise level.
        dtype: of the level.
    """

    inputs = ("low_picture", "noise_level")
    fields = ("noise_level",)
    pictures = ("image",)
    shows_picture = True
    draws_first = True

    def __init__(self, factor: int, schedule: Schedule, most: int, dtype: str) -> None:
        self.enlarges = factor
        self._schedule, self._most, self._dtype = schedule, most, dtype

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        image = to_enlarge(given).image
        level = min(NOISE_LEVEL, self._most) if request.noise_level is None else request.noise_level
        low = self._schedule.add_noise(image, noise.normal(image.shape), level)
        return Sides.same({"low_picture": low, "noise_level": np.array(level, self._dtype)})

    def check_settings(self, request: Request) -> None:
        """Refuse a strength, and a noise level that is too large. See `Conditioner`."""
        if (request.noise_level or 0) > self._most:
            needed = f"a whole number from 0 to {self._most}"
            raise RequestError(f"noise_level is {request.noise_level}", needed=needed)
        if request.strength is not None:
            found = f"strength is {request.strength:g}, and the model begins on noise, with the picture beside it"
            raise RequestError(found, needed="a request without strength")


def to_enlarge(given: Given | None) -> Given:
    """Return the given picture. Raise RequestError where there is none."""
    if given is None:
        raise RequestError(
            "the model enlarges pictures, and there is none",
            needed="the picture to enlarge",
            fix="pass image=, --image",
        )
    return given
