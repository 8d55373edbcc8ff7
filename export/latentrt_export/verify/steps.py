"""The second depth: every solver's table against its diffusers scheduler."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from latentrt.errors import RequestError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import Table, advance, tabulate
from latentrt_export.verify.checks import Array, Check, difference, not_served, worst
from latentrt_export.verify.exact import Walk, noises, numpy_of
from latentrt_export.verify.reference import comparing, diffusers_scheduler

STEP_BOUND = 1e-5  # in float32, relative to the largest latent, at every step
EXACT_BOUND = 1e-6  # in float64; 1e-9 was measured, and 7e-7 on grids that diffusers makes from float32 logarithms
SHAPE = (1, 4, 8, 8)
SEED = 2
NO_DIFFUSERS_TWIN = ("dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion")

Network = Callable[[int, Array], Array]  # of a row's index and what the network is shown


def step_checks(schedule: Schedule, steps: int) -> Iterator[Check]:
    """Measure every solver's table on a schedule against its diffusers scheduler, in float64 and in float32."""
    for name, solver in SOLVERS.items():
        if name in NO_DIFFUSERS_TWIN:
            continue
        what = f"{name}: {solver.scheduler}"
        try:
            table = tabulate(name, schedule, steps)
        except (ScheduleError, RequestError) as error:
            yield not_served("step", what, STEP_BOUND, error)
            continue
        with comparing(solver.scheduler):
            if walk_of(table, schedule, exact=False).timesteps[-1] < 0:
                note = f"diffusers' trailing spacing has one step more than {steps}, by a rounding"
                checks = [not_compared(what, note)]
            else:
                checks = [coefficients_check(what, table, schedule), rounding_check(what, table, schedule)]
        yield from checks


def coefficients_check(what: str, table: Table, schedule: Schedule) -> Check:
    """Measure a table against its diffusers scheduler, both in float64: no rounding hides a wrong coefficient."""
    network = painter(table)
    exact = run_walk(walk_of(table, schedule, exact=True), network)
    if not np.isfinite(exact[-1]).all():
        return not_compared(what, "diffusers' own latents are not finite, in float64 either")
    value = distance(run_table(table, network, np.float64), exact)
    return Check("step", what, f"in float64, worst of {len(table)} rows", value, EXACT_BOUND)


def rounding_check(what: str, table: Table, schedule: Schedule) -> Check:
    """Measure a table in float32 against its diffusers scheduler.

    That is the scheduler as shipped. Where the two differ by more than the bound, diffusers' rounding may be to blame:
    then it is the scheduler in float64, and for the table in float64 too if its own rounding exceeds the bound.
    """
    ours = run_table(table, smooth, np.float32)
    theirs = run_walk(walk_of(table, schedule, exact=False), smooth)
    value, note = distance(ours, theirs), ""
    if not value <= STEP_BOUND:
        exact = run_walk(walk_of(table, schedule, exact=True), smooth)
        if not np.isfinite(exact[-1]).all():
            return not_compared(what, "diffusers' own latents are not finite, in float64 either")
        shipped, value = value, distance(ours, exact)
        note = f"compared in float64: diffusers' own float32 is off by {distance(theirs, exact):.1e}"
        if STEP_BOUND < value < math.inf:
            note += f", and the table's by {value:.1e}"
            value = distance(run_table(table, smooth, np.float64), exact)
        if not value <= STEP_BOUND:
            note = f"off by {shipped:.1e} in float32, and by {value:.1e} compared in float64"
    return Check("step", what, f"in float32, worst of {len(table)} rows", value, STEP_BOUND, note=note)


def not_compared(what: str, note: str) -> Check:
    """Return a check that diffusers leaves nothing to make with."""
    return Check("step", what, "not compared", None, STEP_BOUND, note=note)


def run_table(table: Table, network: Network, dtype: type[np.floating]) -> list[Array]:
    """Return our latents after every row, computed in `dtype`."""
    draws, latents = noises(SEED, SHAPE), []
    x = first_noise().astype(dtype) * dtype(table.start)
    memory = np.zeros((4, *SHAPE), dtype)
    for index, row in enumerate(table.rows):
        noise = next(draws).astype(dtype) if row.c else None
        x = advance(row, x, network(index, dtype(row.c_in) * x), memory, noise)
        latents.append(x)
    return latents


def walk_of(table: Table, schedule: Schedule, *, exact: bool) -> Walk:
    """Return the table's diffusers scheduler, ready to walk as many steps."""
    return Walk(diffusers_scheduler(table.solver, schedule), table.steps, exact=exact, seed=SEED)


def run_walk(walk: Walk, network: Network) -> list[Array]:
    """Return a scheduler's latents after every step, with the first latents and the noise of `run_table`."""
    x, latents = walk.tensor(first_noise()) * walk.start, []
    for index in range(len(walk.timesteps)):
        x = walk.step(index, x, lambda shown, index=index: walk.tensor(network(index, numpy_of(shown)))).latents
        latents.append(numpy_of(x))
    return latents


def first_noise() -> Array:
    """Return the standard normal noise that every run begins with."""
    return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


def smooth(_: int, shown: Array) -> Array:
    """A network for float32: smooth, like a trained one, so that rounding is not blown up by its jumps."""
    return np.float32(0.8) * np.tanh(shown) + np.float32(0.1)


def painter(table: Table) -> Network:
    """Return a network for float64 that predicts another picture at each row.

    The latents shrink to that picture as the noise does, so no coefficient is lost beside large latents, and what is
    remembered differs from row to row. Such a network magnifies the rounding of float32.
    """
    pictures = np.random.default_rng(1).standard_normal((len(table), *SHAPE))

    def network(index: int, shown: Array) -> Array:
        row = table.rows[index]
        picture = 0.5 * np.tanh(shown) + 0.5 * pictures[index]
        return (picture - row.u * shown / row.c_in) / row.v

    return network


def distance(ours: list[Array], theirs: list[Array]) -> float:
    """Return the largest difference of all rows, each relative to the row's largest number; infinite if rows lack."""
    if len(ours) != len(theirs):
        return math.inf
    return worst([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
