"""A question's results: raw samples by side, and the goals they are compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, NamedTuple

OURS = "latentrt"
THEIRS = "diffusers"


class Spread(NamedTuple):
    """The median and the ends of some samples."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """Return the spread of one sample or more."""
        return cls(median(samples), min(samples), max(samples))


@dataclass(frozen=True, slots=True)
class Measure:
    """One quantity: for each side its samples, in the order in which they were taken.

    Sample i of every side belongs to round i, so that ratios can be taken round by round: a slow phase of the machine
    slows both sides. The first side is the one that the others are compared with.
    """

    name: str
    unit: str
    samples: Mapping[str, Sequence[float]]
    better: str = "less"

    def spread(self, side: str) -> Spread:
        """Return the spread of one side's samples."""
        return Spread.of(self.samples[side])

    def ratio(self, other: str = THEIRS) -> Spread:
        """Return how many times better the first side is than another one, round by round; below 1 it is worse."""
        first = next(iter(self.samples.values()))
        pairs = list(zip(first, self.samples[other], strict=True))
        return Spread.of([b / a if self.better == "less" else a / b for a, b in pairs])


@dataclass(frozen=True, slots=True)
class Result:
    """A question's answer; `facts` are what was checked beside the samples."""

    measures: Sequence[Measure]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measure:
        return next(measure for measure in self.measures if measure.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Result:
        """Return what `to_dict` wrote; other keys are ignored."""
        return cls([Measure(**measure) for measure in data["measures"]], data["facts"])


class Goal(NamedTuple):
    """A goal, and the measured value."""

    text: str
    measured: str
    reached: bool


def at_least(text: str, measure: Measure, bound: float) -> Goal:
    """Return a goal for the median ratio to diffusers."""
    ratio = measure.ratio()
    return Goal(text, f"{ratio.median:.1f} times ({ratio.low:.1f} to {ratio.high:.1f})", ratio.median >= bound)


def at_most(text: str, measure: Measure, bound: float) -> Goal:
    """Return a goal for the first side's own median."""
    ours = Spread.of(next(iter(measure.samples.values())))
    return Goal(text, f"{ours.median:.3g} {measure.unit} ({ours.low:.3g} to {ours.high:.3g})", ours.median < bound)


def rounded(value: Any) -> Any:
    """Return the same data with six significant digits, more than any clock here can resolve."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value
