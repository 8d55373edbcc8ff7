"""What one call of a network may have, in lanes times latents, and which pictures fit into memory at all."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from latentrt.serve.core.pipeline import Shape

GROWTH = 1.5  # the power of the area by which memory grows beyond what was measured: scores of attention grow by 2
STEP = 8  # sides of tiles, in latents, are multiples of it


class Footprint(NamedTuple):
    """Bytes of memory that were measured for one size.

    Attributes:
        lane: of a call of the denoiser with one lane; where every call has all lanes, of them all.
        decode: of decoding one picture.
    """

    lane: int
    decode: int


@dataclass(frozen=True, slots=True)
class Budget:
    """What calls may have: the area of all lanes at the model's own size, and no more than fits into memory.

    A picture of the model's own size always fits.

    Attributes:
        lanes: of the network.
        own: the shape of the model's own latents.
        memory: bytes that calls may take in all; None: no bound is known.
        measured: what sizes take; beside the largest of them, others count by their area.
        fixed: every call has all lanes, whatever the size: a GPU, where a call that finds no memory fails its own
            request alone, so that sizes are refused only where they surely do not fit.
        tile: the side in latents of the tiles in which larger pictures are decoded; None: they are not.
        adapters: bytes of a lane's LoRAs, which do not grow with its picture and are no part of what was measured.
    """

    lanes: int
    own: Shape
    memory: int | None = None
    measured: Mapping[Shape, Footprint] = field(default_factory=dict)
    fixed: bool = False
    tile: int | None = None
    adapters: int = 0

    def cap(self, shape: Shape) -> int:
        """Return the most lanes of running pictures of a shape; one picture may have more."""
        if self.fixed:
            return self.lanes
        return max(1, min(self.lanes, self.lanes * math.prod(self.own) // math.prod(shape)))

    def lanes_of_call(self, shape: tuple[int, ...]) -> int:
        """Return the most lanes of one call, at least 1."""
        most = self.lanes * math.prod(self.own) // math.prod(shape)
        lane = self._lane(math.prod(shape[1:]))
        if self.memory is not None and lane:
            most = min(most, int(self.denoising / lane))
        return max(1, most)

    @property
    def denoising(self) -> float:
        """Bytes for a call of the denoiser: beside it another picture may be decoded, but on a GPU."""
        return math.inf if self.memory is None else self.memory if self.fixed else self.memory / 2

    @property
    def decoding(self) -> float:
        """Bytes for decoding."""
        return math.inf if self.memory is None else self.memory / 2

    def fits(self, area: int) -> bool:
        """Return whether pictures with so many latents (height times width) can be made within the memory."""
        decoded = area if self.tile is None else min(area, self.tile**2)
        lane, decode = self._lane(area), self._bytes(decoded, "decode")
        return area <= math.prod(self.own[1:]) or (lane <= self.denoising and decode <= self.decoding)

    def largest(self, most: int) -> int:
        """Return the largest area that fits, `most` at most."""
        return bisect_left(range(most), x=True, key=lambda area: not self.fits(area + 1))

    def tiled(self, most: int) -> Budget:
        """Return the budget with tiles as large as can be decoded, where pictures of the area `most` cannot be."""
        own = max(self.own[1:])
        if self.tile is not None or self._bytes(most, "decode") <= self.decoding:
            return self
        fitting = (
            side for side in range(STEP, math.isqrt(most) + 1, STEP) if self._bytes(side**2, "decode") <= self.decoding
        )
        return replace(self, tile=max([-(-own // STEP) * STEP, *fitting]))

    def _lane(self, area: int) -> float:
        """Return the bytes of a call of one lane."""
        return self._bytes(area, "lane") + self.adapters

    def _bytes(self, area: int, of: str) -> float:
        """Return what was measured for the size next to this one, as this one would need it; 0 where nothing was."""
        if not self.measured:
            return 0.0
        known = min(self.measured, key=lambda other: abs(math.log(math.prod(other[1:]) / area)))
        ratio = area / math.prod(known[1:])
        growth = 1.0 if self.fixed or ratio < 1 else GROWTH
        return float(getattr(self.measured[known], of)) * math.pow(ratio, growth)
