"""The guidance scale as an input: models distilled from guided runs (LCM, TCD) read it, and need one lane only."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource

WHOLE_RUN = (0.0, 1.0)


class GuidanceEmbedding(Conditioner):
    """Fills "timestep_cond" (dim,), float32: the embedding of the request's guidance scale.

    Args:
        dim: of the embedding, 4 or more: the UNet's time_cond_proj_dim.
    """

    inputs = ("timestep_cond",)

    def __init__(self, dim: int) -> None:
        self._dim = dim

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        return Sides.same({"timestep_cond": embedding_of(request.guidance or 0.0, self._dim)})

    def check_settings(self, request: Request) -> None:
        """Refuse settings of classifier-free guidance, which such a model does not run. See `Conditioner`."""
        for name, default in (("guidance_rescale", 0.0), ("guidance_interval", WHOLE_RUN)):
            value = getattr(request, name)
            if (tuple(value) if isinstance(value, list) else value) != default:
                raise RequestError(
                    f"{name} is {value}, and the model reads the guidance scale itself",
                    needed=f"{name} {default}",
                    fix=f"leave {name} out",
                )


def embedding_of(guidance: float, dim: int) -> NDArray[np.float32]:
    """Return the embedding (dim,), float32, of a guidance scale as diffusers counts it: sines, then cosines.

    Every step is rounded to float32, as in diffusers' `get_guidance_scale_embedding`: angles reach thousands, where a
    rounding is 5e-4. (torch's own exponential is off by one rounding for one number in a hundred.)

    Source: Meng et al. 2023, section 3.1.
    """
    half = dim // 2
    rate = np.float32(math.log(10_000)) / np.float32(half - 1)
    frequencies = np.exp((np.arange(half, dtype=np.float32) * -rate).astype(np.float64)).astype(np.float32)
    angles = (np.float32(guidance - 1) * np.float32(1000) * frequencies).astype(np.float64)
    return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(dim % 2)]).astype(np.float32)
