"""Job: one picture in progress."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError, NetworkError
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.table import SLOTS, Kept, Table

Float32 = NDArray[np.float32]
Shape = tuple[int, ...]


class Shapes(NamedTuple):
    """What jobs must have in common to share a call: shapes of latents and of inputs by name, and names of scalars."""

    latents: Shape
    inputs: tuple[tuple[str, Shape], ...]
    scalars: tuple[str, ...]


@dataclass(slots=True, eq=False)
class Job:
    """One picture in progress, made with everything that its rows need.

    Attributes:
        table: the rows to run.
        latents: x, (channels, height, width) float32, as the table's solver scales it.
        uncond, cond: inputs of the predictor by name, without the lane axis, for the lane without the prompt and the
            one with it; without guidance uncond is not read.
        noise: where rows that add noise draw it.
        guidance: how the outputs of the two lanes are combined.
        kept: what is put back after every row, where a part of a picture is repainted.
        start: where it is not 0, a GPU makes x before the first row: `start` times the first noise of `noise`, which is
            then a `TorchCudaNoise`. Until it is done, `latents` has only the right shape.
        tag: any value of the owner's.
        row: index of the next row.
        wants_preview: whether ticks leave the predicted clean latents in `preview`.
        deep: the deep features of the last full row, (lanes, ...) float32, on the host, where later rows use them.
        error: why the job ended early, if it did.
        shapes: see `Shapes`.
    """

    table: Table
    latents: Float32
    uncond: Any
    cond: Any
    noise: NoiseSource
    guidance: Guidance = field(default_factory=Guidance)
    kept: Kept | None = None
    start: float = 0.0
    tag: Any = None
    row: int = 0
    wants_preview: bool = False
    preview: Float32 | None = None
    deep: Float32 | None = None
    error: LatentrtError | None = None
    memory: Float32 = field(init=False)
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        self.memory = np.zeros((SLOTS, *self.latents.shape), np.float32)
        inputs = tuple(sorted((name, array.shape) for name, array in self.cond.items()))
        self.shapes = Shapes(self.latents.shape, inputs, tuple(self.table.scalars))

    @property
    def done(self) -> bool:
        """Whether all rows have run, or the job failed."""
        return self.row >= len(self.table) or self.error is not None

    @property
    def guided(self) -> bool:
        """Whether the next row takes two lanes."""
        return self.guidance.acts(self.row, len(self.table))

    @property
    def shallow(self) -> bool:
        """Whether the next row uses deep features again."""
        return bool(self.table.shallow) and self.table.shallow[self.row]

    @property
    def view(self) -> Float32:
        """The latents at the scale of the model's own (variance-preserving) ones, for previews."""
        rows = self.table.rows
        return self.latents * rows[self.row].c_in if self.row < len(rows) else self.latents

    @property
    def most_lanes(self) -> int:
        """The most lanes that any of its rows takes: the number reserved for its whole run."""
        return 2 if self.guidance.scale > 1 else 1

    def fail(self, row: int) -> None:
        """End the job: its latents are not finite after `row` rows."""
        self.error = NetworkError(
            f"the latents are not finite after row {row} of {len(self.table)}",
            needed="finite numbers",
            fix="check the bundle (latentrt verify), or take a smaller guidance or another solver",
        )
