"""What one call of a network may have, in lanes times latents, and which pictures fit into memory at all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from latentrt.serve.core.pipeline import Shape

GROWTH = 1.5  # the power of the area by which memory grows beyond what was measured: scores of attention grow by 2


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
    """

    lanes: int
    own: Shape
    memory: int | None = None
    measured: Mapping[Shape, Footprint] = field(default_factory=dict)
    fixed: bool = False
    tile: int | None = None

    def cap(self, shape: Shape) -> int:
        """Return the most lanes of running pictures of a shape; one picture may have more."""
        if self.fixed:
            return self.lanes
        return max(1, min(self.lanes, self.lanes * math.prod(self.own) // math.prod(shape)))

    def lanes_of_call(self, shape: tuple[int, ...]) -> int:
        """Return the most lanes of one call, at least 1."""
        most = max(1, self.lanes * math.prod(self.own) // math.prod(shape))
        lane = self._bytes(shape, "lane")
        return most if self.memory is None or lane is None else max(1, min(most, int(self._denoising / lane)))

    def fits(self, shape: Shape) -> bool:
        """Return whether a picture of this shape can be made within the memory."""
        if self.memory is None or math.prod(shape) <= math.prod(self.own):
            return True
        lane, decode = self._bytes(shape, "lane"), self._bytes(self._decoded(shape), "decode")
        return (lane or 0) <= self._denoising and (decode or 0) <= self.memory / 2

    def largest_tile(self, step: int, most: int) -> int | None:
        """Return the largest side of tiles, in latents, that can be decoded; None where a square of side `most` can.

        Args:
            step: the side is a multiple of it.
        """
        channels, height, width = self.own
        for side in range(most // step * step, max(height, width), -step):
            if self.memory is None or (self._bytes((channels, side, side), "decode") or 0) <= self.memory / 2:
                return None if side + step > most else side
        return -(-max(height, width) // step) * step

    @property
    def _denoising(self) -> float:
        """Bytes for a call of the denoiser: another picture may be decoded beside it, unless calls share a device."""
        assert self.memory is not None
        return self.memory if self.fixed else self.memory / 2

    def _decoded(self, shape: Shape) -> Shape:
        side = self.tile
        return shape if side is None else (shape[0], min(shape[1], side), min(shape[2], side))

    def _bytes(self, shape: tuple[int, ...], of: str) -> float | None:
        """Return what was measured for the size next to this one, as this one would need it; None: nothing was."""
        if not self.measured:
            return None
        size = math.prod(shape)
        known = min(self.measured, key=lambda other: abs(math.log(math.prod(other) / size)))
        ratio = size / math.prod(known)
        growth = 1.0 if self.fixed or ratio < 1 else GROWTH
        return float(getattr(self.measured[known], of)) * math.pow(ratio, growth)
