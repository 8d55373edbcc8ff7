"""Noise between those of two seeds: the variations of a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.sampling.noise import NoiseSource

Float32 = NDArray[np.float32]
SAME = 0.9995  # the mean cosine beyond which two noises count as one


@dataclass(frozen=True, slots=True)
class Variation:
    """A seed's noise, whose first latents lie between its own and those of another.

    Attributes:
        noise: the seed's; it goes on with what is drawn here.
        other: the noise of the variation's seed, of which nothing was drawn.
        strength: 0 is the first seed's, 1 the other's.
    """

    noise: NoiseSource
    other: NoiseSource
    strength: float

    def first(self, shape: Sequence[int]) -> Float32:
        """Return the noise of first latents (channels, height, width)."""
        return between(self.noise.normal(shape), self.other.normal(shape), self.strength)


def between(one: Float32, other: Float32, part: float) -> Float32:
    """Return the noise that lies a part of the way from one to another, along a sphere.

    Source: `slerp` of AUTOMATIC1111's web UI, modules/rng.py: each column (all rows of one channel) turns by its own
    angle; noises that are almost the same are mixed in a line, in the other direction.

    Args:
        one, other: (channels, height, width).
        part: 0 to 1.
    """
    units = (noise / np.linalg.norm(noise, axis=1, keepdims=True) for noise in (one, other))
    cosine = np.multiply(*units).sum(axis=1, keepdims=True)
    if cosine.mean() > SAME:
        return one * np.float32(part) + other * np.float32(1 - part)
    angle = np.arccos(cosine)
    weights = (np.sin(angle * np.float32(share)) / np.sin(angle) for share in (1 - part, part))
    return np.asarray(next(weights) * one + next(weights) * other, np.float32)
