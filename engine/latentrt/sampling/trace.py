"""Run a solver on symbols and read its coefficients off.

Every network call k gives symbols: ("x", k) the latents it was given, ("out", k) what the network returned, and
("m", k) the quantity remembered from it. The next latents must come out as a combination of x, out and the memories
alone, so an earlier x is eliminated by inverting the step that left it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentrt.errors import TraceError
from latentrt.sampling.schedule import Point
from latentrt.sampling.solvers import Solver
from latentrt.sampling.spacing import Grid

Symbol = tuple[str, int]
NEGLIGIBLE = 1e-13  # relative to the largest coefficient: the remainder where terms cancel


class Sum:
    """A linear combination of symbols. It can be added, scaled and nothing else."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Symbol, float]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: Sum | int) -> Sum:
        if other == 0:  # where sum() starts
            return self
        if not isinstance(other, Sum):
            return NotImplemented
        keys = {**self.terms, **other.terms}
        return Sum({key: self.terms.get(key, 0.0) + other.terms.get(key, 0.0) for key in keys})

    __radd__ = __add__

    def __mul__(self, scale: float) -> Sum:
        if isinstance(scale, Sum):
            return NotImplemented
        return Sum({key: float(scale) * value for key, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, scale: float) -> Sum:
        return self * (1 / float(scale))

    def __sub__(self, other: Sum) -> Sum:
        return self + -1.0 * other

    def __neg__(self) -> Sum:
        return -1.0 * self

    def __getitem__(self, symbol: Symbol) -> float:
        return self.terms.get(symbol, 0.0)


@dataclass(slots=True)
class Call:
    """One network call: its point, the memory p * x + q * out (clipped or not), and the step after it."""

    here: Point
    p: float
    q: float
    clip: float
    leaves: Sum = field(default_factory=lambda: Sum({}))


class Recorder:
    """The `model` and `noise` that a solver is traced with."""

    def __init__(self, prediction: str, clip: float) -> None:
        self.prediction = prediction
        self.clip = clip
        self.calls: list[Call] = []
        self.noises = 0

    def x0(self, x: Sum, here: Point) -> Sum:
        return self._remember(x, here, *x0_from(self.prediction, here), self.clip)

    def epsilon(self, x: Sum, here: Point) -> Sum:
        if self.clip:
            x0 = self.x0(x, here)
            return (x - here.alpha * x0) / here.sigma
        return self._remember(x, here, *epsilon_from(self.prediction, here), 0.0)

    def output(self, x: Sum, here: Point) -> Sum:
        return self._remember(x, here, 0.0, 1.0, 0.0)

    def x0_epsilon(self, x: Sum, here: Point) -> tuple[Sum, Sum]:
        x0 = self.x0(x, here)
        p, q = epsilon_from(self.prediction, here)
        k = len(self.calls) - 1
        return x0, Sum({("x", k): p, ("out", k): q})

    def noise(self) -> Sum:
        self.noises += 1
        return Sum({("noise", self.noises): 1.0})

    def start(self) -> Sum:
        return Sum({("x", 0): 1.0})

    def finish(self, x: Sum) -> None:
        """Record the last call's step."""
        if not self.calls:
            raise TraceError(
                "the solver never called the network", needed="one call or more", fix="call model.x0 in the solver"
            )
        self.calls[-1].leaves = self._reduce(x, len(self.calls) - 1)

    def _remember(self, x: Sum, here: Point, p: float, q: float, clip: float) -> Sum:
        if self.calls:
            self.finish(x)
        k = len(self.calls)
        self.calls.append(Call(here, p, q, clip))
        x.terms = {("x", k): 1.0}  # the solver's own x, so that its history does not grow with every step
        return Sum({("m", k): 1.0})

    def _reduce(self, x: Sum, last: int) -> Sum:
        """Rewrite x so that ("x", last) is the only latents in it."""
        while (k := min((index for kind, index in x.terms if kind == "x"), default=last)) < last:
            old, step = x.terms.pop(("x", k)), self.calls[k].leaves
            kept = step[("x", k)]
            if old == 0:
                continue
            if kept == 0:
                raise TraceError(
                    f"step {last} needs the latents from before step {k}, which kept nothing of them",
                    needed="steps that can be inverted",
                    fix="let the solver remember another quantity",
                )
            others = Sum({key: -value for key, value in step.terms.items() if key != ("x", k)})
            x = x + (old / kept) * (others + Sum({("x", k + 1): 1.0}))
        if not all(map(math.isfinite, x.terms.values())):
            raise OverflowError(f"step {last} has a coefficient that is not finite")
        largest = max(map(abs, x.terms.values()), default=0.0)
        return Sum({key: value for key, value in x.terms.items() if abs(value) > NEGLIGIBLE * largest})


def trace(solver: Solver, grid: Grid, clip: float, arguments: Mapping[str, Any]) -> list[Call]:
    """Return the calls of one run of a solver over a grid.

    Raises:
        TraceError: the solver cannot be written as rows.
    """
    recorder = Recorder(grid.settings["prediction_type"], clip)
    recorder.finish(solver.function(recorder.start(), grid, recorder, recorder.noise, **arguments))
    return recorder.calls


def x0_from(prediction: str, here: Point) -> tuple[float, float]:
    """Return (p, q) with x0 = p * x + q * out for the network's prediction type.

    Source: Salimans and Ho 2022 for v; Karras et al. 2022, table 1, for EDM's "edm", which is v with its sign turned.
    """
    if prediction == "epsilon":
        return 1 / here.alpha, -here.sigma / here.alpha
    if prediction in ("v_prediction", "edm"):
        q = here.sigma * here.spread * here.c_in
        return here.alpha * here.spread**2 * here.c_in**2, q if prediction == "edm" else -q
    return 0.0, 1.0


def epsilon_from(prediction: str, here: Point) -> tuple[float, float]:
    """Return (p, q) with epsilon = p * x + q * out."""
    if prediction == "epsilon":
        return 0.0, 1.0
    if prediction in ("v_prediction", "edm"):
        q = here.alpha * here.spread * here.c_in
        return here.sigma * here.c_in**2, -q if prediction == "edm" else q
    return 1 / here.sigma, -here.alpha / here.sigma
