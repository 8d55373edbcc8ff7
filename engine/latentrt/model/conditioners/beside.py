"""What denoisers read beside the latents: a mask and the picture without its repainted part, or the whole picture.

Source: diffusers' StableDiffusionInpaintPipeline and StableDiffusionXLInpaintPipeline with UNets of nine channels;
StableDiffusionInstructPix2PixPipeline and StableDiffusionXLInstructPix2PixPipeline.
"""

from __future__ import annotations

import numpy as np

from latentrt.bundle.spec import LatentSpec
from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Sides
from latentrt.model.vae.codec import Codec, Encoded
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


class Edited(Conditioner):
    """Fills "beside" (channels, height, width): the latents of the picture that the prompt says how to edit.

    With guidance there are three lanes: with prompt and picture, with the picture alone, with neither (zeros).

    Args:
        latents: how the picture's latents were scaled.
        scaled: whether they stay so.
    """

    inputs = ("beside",)
    fields = ("image_guidance",)
    pictures = ("image",)
    shows_picture = True

    def __init__(self, latents: LatentSpec, *, scaled: bool) -> None:
        self._scale, self._shift = (1.0, 0.0) if scaled else (latents.scale, latents.shift)

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`. Nothing is drawn: the latents are the likeliest of those that the picture may have."""
        if given is None:
            raise RequestError(
                "the model edits pictures, and there is none", needed="a picture", fix="pass image=, --image"
            )
        assert given.encoded is not None, "see `Model.given`"
        shown = {"beside": given.encoded.mean / np.float32(self._scale) + np.float32(self._shift)}
        return Sides({"beside": np.zeros_like(shown["beside"])}, shown, shown)

    def check_settings(self, request: Request) -> None:
        """Refuse a strength, and a second guidance without the first. See `Conditioner`."""
        if request.strength is not None:
            found = f"strength is {request.strength:g}, and the model draws anew beside the given picture"
            raise RequestError(found, needed="none", fix="leave strength out")
        if request.image_guidance is not None and (request.guidance or 0) <= 1:
            found = f"image_guidance is {request.image_guidance:g} and guidance {request.guidance:g}"
            raise RequestError(found, needed="guidance above 1, without which neither acts", fix="raise guidance")
