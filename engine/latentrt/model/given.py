"""A picture that runs begin on: image-to-image and inpainting.

A given picture is brought to the run's size, encoded once, and every job begins on latents of it with as much noise as
the schedule has where the job begins. With a mask, what is not repainted is put back after every row
(`sampling.table.blend`), unless the denoiser itself reads mask and picture. Sizes, filters, thresholds and the order in
which a seed's noise is drawn are those of diffusers' image-to-image and inpainting pipelines, so that the same seed
gives the same picture.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.depth_map import relative
from latentrt.images.inpaint import Overlay
from latentrt.images.pixels import from_uint8
from latentrt.model.vae.codec import Codec, Encoded
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import Kept, Table, noised

Float32 = NDArray[np.float32]
STRENGTH, MASKED_STRENGTH = 0.8, 1.0  # diffusers' own defaults
NAMES = {"image": "picture", "mask": "mask", "depth": "depth map"}  # by their use


@dataclass(frozen=True, slots=True)
class Given:
    """A picture encoded for jobs to start from.

    Attributes:
        image: its pixels, (channels, height, width) float32 in -1..1.
        repaint: which pixels to repaint, (height, width); None: no mask was given.
        encoded: its latents; None where the denoiser reads the pixels themselves.
        mask: (height, width) of the latents, float32, 1 where to repaint and 0 elsewhere; None: no mask was given.
        facts: settings that describe it, for the pictures made from it.
        depth: (1, height, width) of the latents, float32 in -1..1; None: no depth map was given.
        factor: how much larger the pictures are that are made from it.
        overlay: what is laid over the pictures that are made from it, if anything.
        fill: what runs begin on where they repaint; see `Request.mask_fill`.
    """

    image: Float32
    repaint: NDArray[np.bool_] | None
    encoded: Encoded | None
    mask: Float32 | None
    facts: Mapping[str, str]
    depth: Float32 | None = None
    factor: int = 1
    overlay: Overlay | None = None
    fill: str = "original"

    @classmethod
    def of(
        cls,
        pixels: NDArray[np.uint8],
        repaint: NDArray[np.bool_] | None,
        codec: Codec,
        depth: Float32 | None = None,
    ) -> Given:
        """Encode pixels (height, width, channels), and bring what belongs to them to the latents' size.

        Args:
            pixels: of the picture.
            repaint: which of them to repaint, (height, width).
            codec: encodes them.
            depth: values of the depth map, (height, width) of its own.

        Raises:
            RequestError: the mask repaints none of the latents, or the depth map has one value.
            BundleError, PlanError: there is no encoder that can be used here.
        """
        image, facts = from_uint8(pixels[None])[0], {"image": _hash(pixels)}
        encoded, flat = codec.encode(image), None
        if depth is not None:
            facts["depth"] = _hash(depth)
            flat = relative(depth, (encoded.mean.shape[1], encoded.mean.shape[2]))
        if repaint is None:
            return cls(image, None, encoded, None, facts, flat)
        facts["mask"] = _hash(repaint)
        factor = image.shape[1] // encoded.mean.shape[1]
        mask = repaint[::factor, ::factor].astype(np.float32)  # torch's nearest neighbour
        if not mask.any():
            raise RequestError(
                "the mask repaints nothing",
                needed=f"white where to repaint, at least {factor} pixels wide",
                fix="invert the mask, or make its white parts larger",
            )
        return cls(image, repaint, encoded, mask, facts, flat)

    @classmethod
    def small(cls, pixels: NDArray[np.uint8], factor: int, codec: Codec | None = None) -> Given:
        """Take pixels (height, width, channels) to make pictures `factor` times as large.

        `codec` encodes them; None: the denoiser reads the pixels themselves. Raise BundleError, PlanError as `of`.
        """
        image = from_uint8(pixels[None])[0]
        encoded = None if codec is None else codec.encode(image)
        return cls(image, None, encoded, None, {"image": _hash(pixels)}, factor=factor)

    @property
    def size(self) -> tuple[int, int]:
        """The (height, width) in pixels of pictures made from it."""
        _, height, width = self.image.shape
        return height * self.factor, width * self.factor

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
        """Return the request with the size of pictures made from this one. Raise RequestError as `on`."""
        size = self.size
        for side, own, wanted in zip(("height", "width"), size, (request.height, request.width), strict=True):
            if wanted not in (None, own):
                raise RequestError(f"{side} is {wanted}, and the picture was encoded at {own}", needed=f"{side} {own}")
        return replace(request, height=size[0], width=size[1])

    def begin(
        self,
        table: Table,
        noise: NoiseSource,
        strength: float,
        *,
        first: Callable[[Sequence[int]], Float32],
        blends: bool,
    ) -> tuple[Float32, Kept | None]:
        """Return a job's first latents, and the part of the picture that it keeps.

        The draws are diffusers': the VAE's, the run's own, and with a mask one more, by which the inpainting pipelines
        encode the masked picture, even for denoisers that do not read it.

        Args:
            table: of the run.
            noise: of the job.
            strength: how much of the run is made.
            first: draws the run's own noise of a shape: `noise.normal`, or a variation of it.
            blends: whether what is not repainted is put back after every row; False where the denoiser reads the mask
                itself, and draws the masked picture's latents after this.
        """
        assert self.encoded is not None, "runs begin on noise where it is"
        shape = self.encoded.mean.shape
        from_noise = self.mask is not None and strength == 1
        clean = None if from_noise and not blends else self.encoded.draw(noise)
        unit = first(shape)
        begun = unit * np.float32(table.start)
        if not from_noise:
            assert clean is not None
            begun = noised(table.known[0], self._filled(clean, unit), unit)
        if self.mask is None or not blends:
            return begun, None
        assert clean is not None
        self.encoded.draw(noise)
        return begun, Kept(np.broadcast_to(self.mask, shape), clean, unit)

    def _filled(self, clean: Float32, unit: Float32) -> Float32:
        """Return the clean latents with what the run begins on where it repaints; pixels were filled before."""
        if self.mask is None or self.fill not in ("noise", "nothing"):
            return clean
        return np.where(self.mask > 0, unit if self.fill == "noise" else np.float32(0), clean)


def check_uses(pictures: Collection[str], read: Collection[str], model: str) -> None:
    """Refuse pictures whose use a model does not read, or that belong to one that is not there. Raise RequestError."""
    for name in pictures:
        what = NAMES[name]
        if name not in read:
            raise RequestError(f"there is a {what}, and {model} reads none", needed="a request without one")
        if "image" not in pictures:
            found, fix = f"there is a {what} and no picture", "pass it: image=, --image"
            raise RequestError(found, needed="the one it belongs to", fix=fix)


def check_resize(request: Request, pictures: Collection[str], enlarges: int) -> None:
    """Refuse a way of resizing that would mean nothing. Raise RequestError."""
    found = f"resize is {request.resize}"
    if request.resize == "stretch":
        return
    if "image" not in pictures or enlarges > 1:
        found += ", and there is no picture" if enlarges == 1 else ", and the model enlarges pictures as they are"
        raise RequestError(found, needed="a picture that is brought to the run's size", fix="leave resize out")
    if request.mask_crop is not None:
        found += f" and mask_crop {request.mask_crop}, which fills the size by itself"
        raise RequestError(found, needed="one of them", fix="leave one out")


def _hash(array: NDArray[Any]) -> str:
    return f"sha256:{hashlib.sha256(array.tobytes()).hexdigest()}"
