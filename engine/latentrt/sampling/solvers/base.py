"""The arguments of a solver.

A solver gets the latents `x`, the grid of noise levels, a `model` and `noise()`. It calls the model through
`model.x0(x, here)`, `model.epsilon(x, here)` or `model.output(x, here)`, by the quantity that it remembers, and returns
the last latents. It may only add and scale: run on symbols by `sampling.trace` it yields the table; run on arrays it is
the oracle that tests it. It knows nothing of prediction types, guidance or batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from latentrt.sampling.schedule import Point

Vector = Any  # an array or a symbol: anything that can be added and scaled
Noise = Callable[[], Vector]


class Model(Protocol):
    """One network call, answered in the quantity that the solver wants to remember."""

    def x0(self, x: Vector, here: Point) -> Vector:
        """Return the predicted clean latents (clipped where the schedule clips)."""

    def epsilon(self, x: Vector, here: Point) -> Vector:
        """Return the predicted noise, (x - alpha * x0) / sigma."""

    def output(self, x: Vector, here: Point) -> Vector:
        """Return the network's own output."""

    def x0_epsilon(self, x: Vector, here: Point) -> tuple[Vector, Vector]:
        """Return x0 as above and, from the same call, epsilon before any clipping."""
