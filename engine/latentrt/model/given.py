"""A picture that runs begin on: image-to-image and inpainting.

A given picture is brought to the run's size, encoded once, and every job begins on latents of it with as much noise as
the schedule has where the job begins. With a mask, what is not repainted is put back after every row
(`sampling.table.blend`), unless the denoiser itself reads mask and picture. Sizes, filters, thresholds and the order in
which a seed's noise is drawn are those of diffusers' image-to-image and inpainting pipelines, so that the same seed
gives the same picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.pixels import from_uint8
from latentrt.model.codec import Codec, Encoded
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import Kept, Table, noised

Float32 = NDArray[np.float32]
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # diffusers' own defaults


@dataclass(frozen=True, slots=True)
class Given:
    """A picture encoded for jobs to start from.

    Attributes:
        image: its pixels, (channels, height, width) float32 in -1..1.
        repaint: which pixels to repaint, (height, width); None: no mask was given.
        encoded: its latents.
        mask: (height, width) of the latents, float32, 1 where to repaint and 0 elsewhere; None: no mask was given.
        facts: settings that describe it, for the pictures made from it.
    """

    image: Float32
    repaint: NDArray[np.bool_] | None
    encoded: Encoded
    mask: Float32 | None
    facts: Mapping[str, str]

    @classmethod
    def of(cls, pixels: NDArray[np.uint8], repaint: NDArray[np.bool_] | None, codec: Codec) -> Given:
        """Encode pixels (height, width, channels) and which of them to repaint, (height, width).

        Raises:
            RequestError: the mask repaints none of the latents.
            BundleError, PlanError: there is no encoder that can be used here.
        """
        image = from_uint8(pixels[None])[0]
        facts = {"image": f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"}
        encoded = codec.encode(image)
        if repaint is None:
            return cls(image, None, encoded, None, facts)
        facts["mask"] = f"sha256:{hashlib.sha256(repaint.tobytes()).hexdigest()}"
        factor = image.shape[1] // encoded.mean.shape[1]
        mask = repaint[::factor, ::factor].astype(np.float32)  # torch's nearest neighbour
        if not mask.any():
            raise RequestError(
                "the mask repaints nothing",
                needed=f"white where to repaint, at least {factor} pixels wide",
                fix="invert the mask, or make its white parts larger",
            )
        return cls(image, repaint, encoded, mask, facts)

    def on(self, request: Request) -> Request:
        """Return the request with this picture's size, and with a strength.

        Raises:
            RequestError: the request wants another size.
        """
        strength = request.strength
        if strength is None:
            strength = STRENGTH if self.mask is None else MASKED_STRENGTH
        return replace(self.sized(request), strength=strength)

    def sized(self, request: Request) -> Request:
        """Return the request with this picture's size. Raise RequestError as `on`."""
        size = self.image.shape[1:]
        for side, own, wanted in zip(("height", "width"), size, (request.height, request.width), strict=True):
            if wanted not in (None, own):
                raise RequestError(f"{side} is {wanted}, and the picture was encoded at {own}", needed=f"{side} {own}")
        return replace(request, height=size[0], width=size[1])

    def begin(self, table: Table, noise: NoiseSource, strength: float, *, blends: bool) -> tuple[Float32, Kept | None]:
        """Return a job's first latents, and the part of the picture that it keeps.

        The draws are diffusers': the VAE's, the run's own, and with a mask one more, by which the inpainting pipelines
        encode the masked picture, even for denoisers that do not read it.

        Args:
            table: of the run.
            noise: of the job.
            strength: how much of the run is made.
            blends: whether what is not repainted is put back after every row; False where the denoiser reads the mask
                itself, and draws the masked picture's latents after this.
        """
        shape = self.encoded.mean.shape
        from_noise = self.mask is not None and strength == 1
        clean = None if from_noise and not blends else self.encoded.draw(noise)
        unit = noise.normal(shape)
        first = unit * np.float32(table.start)
        if not from_noise:
            assert clean is not None
            first = noised(table.known[0], clean, unit)
        if self.mask is None or not blends:
            return first, None
        assert clean is not None
        self.encoded.draw(noise)
        return first, Kept(np.broadcast_to(self.mask, shape), clean, unit)
