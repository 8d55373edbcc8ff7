"""A VAE's networks called tile by tile: what a call needs then depends on the tile, not on the picture.

Tiles overlap by a quarter, and what two of them both cover fades from the one to the other. Where tiles lie, and the
order and weights of the fading, are those of diffusers' `AutoencoderKL.enable_tiling`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import PlanError, RequestError
from latentrt.runtime.tensorrt.record import Profile
from latentrt.values import is_whole

Float32 = NDArray[np.float32]
Run = Callable[[Float32], Float32]  # a network: (count, channels, height, width) to another such array
Between = Callable[[int], None]  # called before each tile but the first, with the latents of a whole one
PARTS = 4  # of a tile's side; the last part overlaps with the next tile


@dataclass(frozen=True, slots=True)
class Tiles:
    """How latents are cut into tiles.

    Attributes:
        side: of a tile, in latents; a multiple of PARTS.
        factor: pixels a side of each latent.
    """

    side: int
    factor: int

    @classmethod
    def of(cls, pixels: int, factor: int) -> Tiles:
        """Return tiles with a side of so many pixels. Raise RequestError where it cannot be cut into its parts."""
        step = PARTS * factor
        if not is_whole(pixels) or pixels < step or pixels % step:
            raise RequestError(f"tile is {pixels!r}", needed=f"a multiple of {step} pixels", fix=f"take {64 * factor}")
        return cls(pixels // factor, factor)

    def cut(self, height: int, width: int) -> bool:
        """Return whether latents of this size are more than one tile."""
        return max(height, width) > self.side

    def sizes(self, height: int, width: int) -> set[tuple[int, int]]:
        """Return the (height, width) of the tiles of latents of this size; those at the far edges are smaller."""
        if not self.cut(height, width):
            return {(height, width)}
        step = self.side - self.side // PARTS
        rows, columns = ({min(self.side, side - at) for at in range(0, side, step)} for side in (height, width))
        return {(row, column) for row in rows for column in columns}

    def check_plans(self, height: int, width: int, plans: Sequence[Profile]) -> None:
        """Raise PlanError where none of a decoder's plans takes a tile of latents of this size."""
        for rows, columns in sorted(self.sizes(height, width)) if plans else ():
            if not any(plan.covers({"batch": 1, "height": rows, "width": columns}) for plan in plans):
                size = f"{columns * self.factor}x{rows * self.factor}"
                raise PlanError(
                    f"no plan of the decoder takes a tile of {size} pixels",
                    needed=f"one of {'; or '.join(map(str, plans))} in latents",
                    fix=f"latentrt build BUNDLE --profile size={size}, beside those that it has",
                )

    def decode(self, run: Run, latents: Float32, between: Between) -> Float32:
        """Return the pictures of latents (count, channels, height, width)."""
        if not self.cut(*latents.shape[2:]):
            return run(latents)
        return _joined(run, latents, self.side, self.side * self.factor, partial(between, self.side**2))

    def encode(self, run: Run, images: Float32, between: Between) -> Float32:
        """Return what an encoder gives for pictures (count, channels, height, width)."""
        height, width = (side // self.factor for side in images.shape[2:])
        if not self.cut(height, width):
            return run(images)
        return _joined(run, images, self.side * self.factor, self.side, partial(between, self.side**2))


def _joined(run: Run, array: Float32, side: int, made: int, between: Callable[[], None]) -> Float32:
    """Run tiles of an array one by one, and join what comes out.

    Args:
        run: the network.
        array: (count, channels, height, width).
        side: of a tile of the array.
        made: of what the network makes of it.
        between: called before each tile but the first.
    """
    step, fade = side - side // PARTS, made // PARTS
    kept = made - fade
    above: list[Float32] = []
    rows: list[Float32] = []
    for top in range(0, array.shape[2], step):
        row: list[Float32] = []
        for left in range(0, array.shape[3], step):
            if top or left:
                between()
            tile = np.array(run(np.ascontiguousarray(array[:, :, top : top + side, left : left + side])))
            if above:
                _fade(above[len(row)], tile, fade)
            if row:
                _fade(row[-1].swapaxes(2, 3), tile.swapaxes(2, 3), fade)
            row.append(tile)
        rows.append(np.concatenate([tile[:, :, :kept, :kept] for tile in row], axis=3))
        above = row
    return np.concatenate(rows, axis=2)


def _fade(before: Float32, after: Float32, most: int) -> None:
    """Let the first rows of `after` come out of the last rows of `before`, in place; at most so many rows."""
    count = min(before.shape[2], after.shape[2], most)
    weight = (np.arange(count) / count).astype(np.float32)[:, None]
    rest = (1 - np.arange(count) / count).astype(np.float32)[:, None]
    after[:, :, :count] = before[:, :, before.shape[2] - count :] * rest + after[:, :, :count] * weight
