"""Runs that begin on a given picture: which part of the whole run they make."""

from __future__ import annotations

from latentrt.errors import RequestError, ScheduleError
from latentrt.sampling.solvers import Solver


def left_out(name: str, solver: Solver, steps: int, strength: float) -> int:
    """Return how many steps of the whole run are left out at its beginning, as diffusers counts them.

    Args:
        name, solver: who makes the steps.
        steps: of the whole run.
        strength: how much of it is made.

    Raises:
        RequestError: a strength that leaves no step.
        ScheduleError: the solver cannot begin midway.
    """
    first = steps - int(steps * strength)
    if first == steps:
        raise RequestError(
            f"a strength of {strength:g} leaves none of {steps} steps",
            needed=f"1 / {steps} or more",
            fix="raise strength, or take more steps",
        )
    if first and solver.only_whole:
        raise ScheduleError(
            f"{name} cannot begin midway ({solver.only_whole})",
            needed="a strength of 1 or another solver",
            fix="take dpmpp-2m",
        )
    return first


def check_strength(strength: object) -> None:
    """Refuse a strength that is none.

    Raises:
        RequestError: it is no number above 0 and at most 1.
    """
    if isinstance(strength, bool) or not isinstance(strength, (int, float)) or not 0 < strength <= 1:
        raise RequestError(f"strength is {strength!r}", needed="a number above 0 and at most 1")
