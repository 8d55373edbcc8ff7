"""Pixels to latents and back: a VAE's latents, or the pixels themselves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import DECODER, ENCODER, LatentSpec, ModelSpec
from latentrt.errors import BundleError, NetworkError
from latentrt.model.vae.tiles import Between, Tiles
from latentrt.runtime.base import Network, call
from latentrt.sampling.noise import NoiseSource

Float32 = NDArray[np.float32]
SMALL = 64 * 64  # latents of a picture of 512 x 512


@dataclass(frozen=True, slots=True)
class Encoded:
    """The latents of a picture, (channels, height, width): mean and standard deviation, None if the mean is exact."""

    mean: Float32
    std: Float32 | None = None

    def draw(self, noise: NoiseSource) -> Float32:
        """Return one sample of the picture's latents; without a standard deviation no noise is drawn."""
        return self.mean if self.std is None else self.mean + self.std * noise.normal(self.mean.shape)


def nothing(latents: int) -> None:
    """Do nothing between two tiles."""


class Codec(Protocol):
    """Encodes and decodes pictures; scale and shift of the latents are applied here."""

    def encode(self, image: Float32) -> Encoded:
        """Return the latents of one picture (channels, height, width) in -1..1, sides multiples of the factor.

        Raises:
            NetworkError: the numbers are not finite.
            BundleError, PlanError: there is no encoder that can be used here.
        """

    def decode(self, latents: Float32) -> Float32:
        """Return (count, channels, height, width) latents as pictures (count, channels, H, W) in about -1..1."""


class Vae:
    """A VAE of two networks, AutoencoderKL or AutoencoderTiny.

    Args:
        decoder: from "latents" to "image".
        encoder: from "image" to "moments": mean, then log variance; or to "latents", which are exact. None where the
            bundle has none.
        latents: scale and shift.
        tiles: how latents that are larger than one tile are cut; None: they are not.

    Attributes:
        between: called between two tiles, with the latents (height times width) of one. It may call the networks.
    """

    def __init__(
        self, decoder: Network, encoder: Network | None, latents: LatentSpec, tiles: Tiles | None = None
    ) -> None:
        self._decoder, self._encoder = decoder, encoder
        self._spec, self.tiles = latents, tiles
        self.between: Between = nothing

    def encode(self, image: Float32) -> Encoded:
        """See `Codec.encode`."""
        encoder = self._encoder
        if encoder is None:
            raise BundleError("the bundle has no VAE encoder", needed="one, to begin on a picture")
        (output,) = encoder.graph.outputs

        def run(images: Float32) -> Float32:
            return call(encoder, {"image": images})[output.name]

        (found,) = run(image[None]) if self.tiles is None else self.tiles.encode(run, image[None], self.between)
        if not np.isfinite(found).all():
            raise NetworkError(
                "the VAE encoder's numbers are not finite", needed="finite numbers", fix="take --precision fp32"
            )
        scale, shift = np.float32(self._spec.scale), np.float32(self._spec.shift)
        if output.name == "latents":
            return Encoded((found - shift) * scale)
        mean, log_variance = np.split(found, 2)
        std: Float32 = np.exp(log_variance.clip(-30, 20) / 2)  # diffusers' DiagonalGaussianDistribution
        return Encoded((mean - shift) * scale, std * scale)

    def decode(self, latents: Float32) -> Float32:
        """See `Codec.decode`."""

        def run(unscaled: Float32) -> Float32:
            return call(self._decoder, {"latents": unscaled})["image"]

        unscaled = latents / self._spec.scale + self._spec.shift
        return run(unscaled) if self.tiles is None else self.tiles.decode(run, unscaled, self.between)


class Identity:
    """The codec of pixel models: latents are the pixels themselves."""

    def encode(self, image: Float32) -> Encoded:
        """Return the picture."""
        return Encoded(image)

    def decode(self, latents: Float32) -> Float32:
        """Return the pictures."""
        return latents


def codec_of(spec: ModelSpec, networks: Mapping[str, Network], tiles: Tiles | None) -> Codec:
    """Return the codec of a model: its VAE, or the identity for one that draws pixels."""
    decoder, encoder = (next((networks[name] for name in spec.named(role)), None) for role in (DECODER, ENCODER))
    return Identity() if decoder is None else Vae(decoder, encoder, spec.latents, tiles)


def decode_each(codec: Codec, latents: Iterable[Float32], cores: int) -> Iterator[Float32]:
    """Yield the pictures (channels, H, W) of latents (channels, height, width).

    Neighbours of one shape are decoded together, one on each core, if they have no more latents than one picture of
    512 x 512: what a decoder needs grows with the pixels, to gigabytes. The numbers are those of each alone.

    Args:
        codec: decodes them.
        latents: of the pictures.
        cores: as `Facts` has it.
    """
    for (_, height, width), group in groupby(latents, lambda one: one.shape):
        waiting = list(group)
        together = cores if cores * height * width <= SMALL else 1
        while waiting:
            count = together if len(waiting) >= together else 1
            yield from codec.decode(np.stack(waiting[:count]))
            del waiting[:count]
