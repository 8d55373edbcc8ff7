"""Inputs of an inpainting denoiser beside the latents: the mask, and the picture without its repainted part.

Source: diffusers' StableDiffusionInpaintPipeline and StableDiffusionXLInpaintPipeline with UNets of nine channels.
"""

from __future__ import annotations

import numpy as np

from latentrt.errors import RequestError
from latentrt.model.codec import Codec, Encoded
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource


class Repainted(Conditioner):
    """Fills "beside" (1 + channels, height, width): the mask, 1 where to repaint, and the masked picture's latents."""

    inputs = ("beside",)
    pictures = ("image", "mask")

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._last: tuple[Given, Encoded] | None = None  # for the pictures of one request

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`. One noise is drawn, to choose among the latents that the masked picture may have."""
        if given is None or given.mask is None or given.repaint is None:
            raise RequestError(
                "the model repaints pictures, and there is no mask" if given else "the model repaints pictures",
                needed="a picture, and a mask that is white where to repaint",
                fix="pass image= and mask=, --image and --mask",
            )
        known, encoded = self._last or (None, None)
        if known is not given or encoded is None:
            encoded = self._codec.encode(given.image * ~given.repaint)  # 0, which is grey, in the repainted part
            self._last = given, encoded
        return Sides.same({"beside": np.concatenate([given.mask[None], encoded.draw(noise)])})
