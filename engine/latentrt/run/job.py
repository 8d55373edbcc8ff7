"""Job: one picture in progress."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError, NetworkError
from latentrt.images.inpaint import Overlay
from latentrt.model.control import Applied
from latentrt.model.inputs import Inputs, Sides
from latentrt.model.predictor import Predictor
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource
from latentrt.sampling.rows import SLOTS
from latentrt.sampling.table import Kept, Table

Float32 = NDArray[np.float32]
Shape = tuple[int, ...]
InputShapes = tuple[tuple[str, Shape], ...]


class Shapes(NamedTuple):
    """What jobs must have in common to move together.

    Attributes:
        latents: the shape of the latents.
        sides: shapes of the inputs by name: once where all lanes of a job have the same, else for each of its lanes.
        scalars: names of the table's scalars.
        predictor: what their rows call.
    """

    latents: Shape
    sides: tuple[InputShapes, ...]
    scalars: tuple[str, ...]
    predictor: Predictor | None = None


@dataclass(frozen=True, slots=True)
class Stage:
    """A later part of a job's run.

    Attributes:
        table, uncond, cond, guidance, predictor, image, controls: as a job's own.
        begin: turns the latents that the stage before left, and the job's noise, into this one's first latents.
        shape: of these; None: as before.
    """

    table: Table
    uncond: Inputs
    cond: Inputs
    begin: Callable[[Float32, NoiseSource], Float32]
    guidance: Guidance
    predictor: Predictor | None = None
    image: Inputs | None = None
    controls: tuple[Applied, ...] = ()
    shape: Shape | None = None


@dataclass(slots=True, eq=False)
class Job:
    """One picture in progress, made with everything that its rows need.

    A run may have several stages: then all this is the present stage's, and becomes the next one's in `go_on`.

    Attributes:
        table: the rows to run.
        latents: x, (channels, height, width) float32, as the table's solver scales it.
        uncond, cond, image: inputs of the predictor by name, without the lane axis, for the lane without the prompt,
            the one with it, and that of the picture's own guidance; see `Sides`. Rows without guidance read cond alone.
        noise: where rows that add noise draw it.
        guidance: how the outputs of the lanes are combined.
        controls: the ControlNets that act on it.
        kept: what is put back after every row, where a part of a picture is repainted.
        overlay: what is laid over its decoded picture, if anything.
        start: where it is not 0, a GPU makes x before the first row: `start` times the first noise of `noise`, which is
            then a `TorchCudaNoise`. Until it is done, `latents` has only the right shape.
        predictor: what its rows call; None is what the lanes were made for.
        later: the stages after this one.
        made_with: the bundle whose weights its inputs were computed with; None: any.
        tag: any value of the owner's.
        row: index of the next row.
        before: how many rows earlier stages had.
        wants_preview: whether ticks leave the predicted clean latents in `preview`.
        deep: the deep features of the last full row, (lanes, ...) float32, on the host, where later rows use them.
        error: why the job ended early, if it did.
        shapes: see `Shapes`.
    """

    table: Table
    latents: Float32
    uncond: Inputs
    cond: Inputs
    noise: NoiseSource
    guidance: Guidance = field(default_factory=Guidance)
    image: Inputs | None = None
    controls: tuple[Applied, ...] = ()
    kept: Kept | None = None
    overlay: Overlay | None = None
    start: float = 0.0
    predictor: Predictor | None = None
    later: tuple[Stage, ...] = ()
    made_with: object = None
    tag: Any = None
    row: int = 0
    before: int = 0
    wants_preview: bool = False
    preview: Float32 | None = None
    deep: Float32 | None = None
    error: LatentrtError | None = None
    memory: Float32 = field(init=False)
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        self._set_up()

    def _set_up(self) -> None:
        self.memory = np.zeros((SLOTS, *self.latents.shape), np.float32)
        self.shapes = Shapes(self.latents.shape, _shapes_of(self.sides), tuple(self.table.scalars), self.predictor)

    @property
    def ended(self) -> bool:
        """Whether all rows of this stage have run, or the job failed."""
        return self.row >= len(self.table) or self.error is not None

    @property
    def done(self) -> bool:
        """Whether all rows of all stages have run, or the job failed."""
        return self.ended and (not self.later or self.error is not None)

    @property
    def rows(self) -> int:
        """How many rows all stages have."""
        return self.before + len(self.table) + sum(len(stage.table) for stage in self.later)

    @property
    def moved(self) -> int:
        """How many of them have run."""
        return self.before + self.row

    def go_on(self) -> None:
        """Begin the next stage. The lanes must have been given back."""
        stage, *later = self.later
        self.latents = stage.begin(self.latents, self.noise)
        self.table, self.uncond, self.cond, self.image = stage.table, stage.uncond, stage.cond, stage.image
        self.guidance, self.predictor, self.later = stage.guidance, stage.predictor, tuple(later)
        self.controls = stage.controls
        self.before, self.row = self.moved, 0
        self.kept, self.deep, self.start = None, None, 0.0
        self._set_up()

    def stop(self) -> None:
        """Take what the last row predicts for the picture. That row must have left a preview, and the lanes be given
        back.
        """
        assert self.preview is not None
        kept, self.latents = self.kept, self.preview
        if kept is not None:
            self.latents = np.where(kept.mask > 0, self.latents, kept.clean)
        self.later, self.tag = (), {**self.tag, "stopped_after": self.moved}

    @property
    def guided(self) -> bool:
        """Whether guidance acts in the next row."""
        return self.guidance.acts(self.row, len(self.table))

    @property
    def sides(self) -> tuple[Inputs, ...]:
        """The inputs of its lanes in rows with guidance, the prompt's last."""
        return Sides(self.uncond, self.cond, self.image).lanes(self.guidance.lanes)

    @property
    def lanes(self) -> int:
        """The lanes that the next row takes."""
        return self.guidance.lanes if self.guided else 1

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
    def largest(self) -> Shape:
        """The shape of its latents in the stage with the most of them."""
        later = (stage.shape for stage in self.later if stage.shape is not None)
        return max([self.latents.shape, *later], key=math.prod)

    @property
    def most_lanes(self) -> int:
        """The most lanes that any of its rows takes, in any stage: the number reserved for its whole run."""
        return max(self.guidance.lanes, *(stage.guidance.lanes for stage in self.later), 1)

    def fail(self, row: int) -> None:
        """End the job: its latents are not finite after `row` rows."""
        self.error = NetworkError(
            f"the latents are not finite after row {row} of {len(self.table)}",
            needed="finite numbers",
            fix="check the bundle (latentrt verify), or take a smaller guidance or another solver",
        )


def _shapes_of(sides: Sequence[Inputs]) -> tuple[InputShapes, ...]:
    """Return `Shapes.sides`. Inputs that a side leaves out, since they are zeros, have no shapes of their own."""
    found = [tuple(sorted((name, array.shape) for name, array in side.items())) for side in sides]
    return (found[-1],) if all(set(shapes) <= set(found[-1]) for shapes in found) else tuple(found)
