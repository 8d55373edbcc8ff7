"""The latents of a picture to enlarge, beside the latents, and the noise as a number.

Source: diffusers' StableDiffusionLatentUpscalePipeline.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError, ScheduleError
from latentrt.model.conditioners.low_picture import to_enlarge
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import Table


class LowLatents(Conditioner):
    """Fills "low_latents" (channels, height, width): the picture's latents, each one four times.

    They are drawn, from those that the picture may have, before the first latents' noise.
    """

    inputs = ("low_latents",)
    pictures = ("image",)
    shows_picture = True
    draws_first = True
    enlarges = 2
    encodes = True

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        encoded = to_enlarge(given).encoded
        assert encoded is not None, "see `encodes`"
        small = encoded.draw(noise)
        return Sides.same({"low_latents": small.repeat(self.enlarges, axis=1).repeat(self.enlarges, axis=2)})

    def check_settings(self, request: Request) -> None:
        """Refuse a strength, and a guidance of 0, at which diffusers does not read the prompt. See `Conditioner`."""
        if request.strength is not None:
            found = f"strength is {request.strength:g}, and the model begins on noise, with the picture beside it"
            raise RequestError(found, needed="a request without strength")
        if request.guidance == 0 and request.prompt:
            raise RequestError(
                "guidance is 0, at which diffusers' latent upscaler does not read its prompt",
                needed="an empty prompt, or guidance 1 or more",
                fix='for that picture, pass the prompt ""',
            )


class Sigma(Conditioner):
    """Fills "sigma" (), float32, of each row: the noise in what the denoiser gets, relative to the signal."""

    inputs = ("sigma",)

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        return Sides.same({})

    def scalars(self, request: Request, table: Table) -> Mapping[str, NDArray[np.float64]]:
        """See `Conditioner`."""
        if not (np.isfinite(table.sigmas) & (table.sigmas > 0)).all():
            raise ScheduleError(
                f"{table.solver} at {table.steps} steps calls the network where there is no signal, or no noise",
                needed="both at every row: the denoiser reads the logarithm of their ratio",
                fix="take another timestep_spacing",
            )
        return {"sigma": table.sigmas}
