"""One measurement against its bound, and how arrays are compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its bound.

    Attributes:
        depth: "golden", "network", "step", "image" or "batch".
        what, measure: what was measured, and how.
        value: the figure; None is what cannot be measured, and `note` says why.
        bound: of the value.
        at_least: whether the value should be large (dB).
        note: what else a reader has to know, if anything.
    """

    depth: str
    what: str
    measure: str
    value: float | None
    bound: float
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the value keeps its bound; NaN never does. None: there is nothing to keep it."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, which has no NaN and no infinity: those are text."""
        finite = self.value is None or math.isfinite(self.value)
        return {**asdict(self), "value": self.value if finite else str(self.value), "passed": self.passed}


def not_served(depth: str, what: str, bound: float, error: LatentrtError) -> Check:
    """Return a check that could not be made, and why."""
    return Check(depth, what, "not served", None, bound, note=error.found)


def relative_l2(ours: Array, theirs: Array) -> float:
    """Return the L2 norm of the difference, relative to that of `theirs`."""
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def difference(ours: Array, theirs: Array) -> float:
    """Return the largest difference, relative to the largest number: units and scales fall out."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def worst(values: Sequence[float]) -> float:
    """Return the largest; numpy's maximum keeps a NaN, Python's loses one that is not first."""
    return float(np.max(values))


def psnr(ours: Array, theirs: Array) -> float:
    """Return the peak signal-to-noise ratio of uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")
