"""The step depth: every solver's table against its diffusers scheduler, and where they differ, which rounds more."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from latentrt.errors import RequestError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.settings import EDM_DEFAULTS
from latentrt.sampling.solvers import solvers_of
from latentrt.sampling.table import Table, advance, tabulate
from latentrt_export.verify.checks import Array, Check, difference, not_served, worst
from latentrt_export.verify.exact import Walk, noises, numpy_of
from latentrt_export.verify.reference import comparing, diffusers_scheduler, scheduler_of

STEP_BOUND = 1e-5  # in float32, relative to the largest latent, at every step
EXACT_BOUND = 1e-8  # in float64; 6e-10 was measured with cosine betas, where sigma is 20 000, else 2e-12
COARSE_GRID_BOUND = 1e-6  # the same, where diffusers makes the sigmas themselves from float32 logarithms
EDM_GRID_BOUND = 1e-5  # where it makes EDM's sigmas in float32, up to 120; 6e-6 was measured
SHAPE = (1, 4, 8, 8)
SEED = 2
NO_DIFFUSERS_TWIN = ("dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion")

Network = Callable[[int, Array], Array]  # of a row's index and what the network is shown


def step_checks(schedule: Schedule, steps: int, loaded: Any = None) -> Iterator[Check]:
    """Measure every solver's table on a schedule against its diffusers scheduler.

    Args:
        schedule: ours.
        steps: of each table.
        loaded: the scheduler of the diffusers pipeline; None: one made of the schedule's config.
    """
    for name, solver in solvers_of(schedule).items():
        if name in NO_DIFFUSERS_TWIN:
            continue
        try:
            table = tabulate(name, schedule, steps)
        except (ScheduleError, RequestError) as error:
            yield not_served("step", name, STEP_BOUND, error)
            continue
        with comparing(solver.scheduler):
            checks = list(table_checks(table, schedule, loaded))
        yield from checks


def table_checks(table: Table, schedule: Schedule, loaded: Any = None) -> Iterator[Check]:
    """Measure a table twice: its coefficients in float64, and in float32 what rounding adds. See `step_checks`."""
    loaded = scheduler_of(schedule) if loaded is None else loaded
    walk = walk_of(table, loaded, exact=True)
    if schedule.scheduler not in EDM_DEFAULTS and walk.timesteps[-1] < 0:
        yield not_compared(table, f"diffusers' trailing spacing makes a rounding error and {table.steps + 1} steps")
        return
    if len(walk.timesteps) != len(table):
        yield Check("step", table.solver, "rows too many or too few", abs(len(table) - len(walk.timesteps)), 0)
        return
    network = painter(table)
    exact = run_walk(walk, network)
    if not np.isfinite(exact[-1]).all():
        yield not_compared(table, "diffusers' own latents are not finite, in float64 either")
        return
    value = distance(run_table(table, network, np.float64), exact)
    yield Check("step", table.solver, f"float64, worst of {len(table)} rows", value, exact_bound(schedule))
    yield rounding_check(table, loaded)


def rounding_check(table: Table, loaded: Any) -> Check:
    """Measure a table in float32 against its diffusers scheduler as shipped, in float32 too.

    Where they differ by more than the bound, both are measured against the scheduler in float64, to tell which rounds
    more. The table has to keep the bound there, or be no further off than diffusers.
    """
    ours = run_table(table, smooth, np.float32)
    theirs = run_walk(walk_of(table, loaded, exact=False), smooth)
    value, bound, note = distance(ours, theirs), STEP_BOUND, ""
    if not value <= bound:
        exact = run_walk(walk_of(table, loaded, exact=True), smooth)
        value, shipped = distance(ours, exact), distance(theirs, exact)
        coarser = "the table" if value > shipped else "diffusers"
        theirs_is = f"off by {shipped:.1e}" if math.isfinite(shipped) else "not finite"
        note = f"{coarser} is the coarser side: against float64, diffusers' float32 is {theirs_is}, "
        note += f"the table's is off by {value:.1e}"
        if bound < value <= shipped < math.inf:
            bound = shipped
    return Check("step", table.solver, f"float32, worst of {len(table)} rows", value, bound, note=note)


def not_compared(table: Table, note: str) -> Check:
    """Return a check that diffusers leaves nothing to make with."""
    return Check("step", table.solver, "not compared", None, STEP_BOUND, note=note)


def exact_bound(schedule: Schedule) -> float:
    """Return the bound of float64 on a schedule."""
    config = schedule.config
    if schedule.scheduler in EDM_DEFAULTS:
        return EDM_GRID_BOUND
    coarse = config.get("use_lu_lambdas") or config.get("interpolation_type") == "log_linear"
    return COARSE_GRID_BOUND if coarse else EXACT_BOUND


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


def walk_of(table: Table, loaded: Any, *, exact: bool) -> Walk:
    """Return the table's diffusers scheduler, ready to walk as many steps."""
    return Walk(diffusers_scheduler(table.solver, loaded), table.steps, exact=exact, seed=SEED)


def run_walk(walk: Walk, network: Network) -> list[Array]:
    """Return a scheduler's latents after every step, with the first latents and the noise of `run_table`."""
    x, latents = walk.tensor(first_noise()) * walk.start, []
    for index in range(len(walk.timesteps)):

        def called(shown: torch.Tensor, index: int = index) -> torch.Tensor:
            return walk.tensor(network(index, numpy_of(shown)))

        x = walk.step(index, x, called).latents
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
        picture: Array = 0.5 * np.tanh(shown) + 0.5 * pictures[index]
        return (picture - row.u * shown / row.c_in) / row.v

    return network


def distance(ours: list[Array], theirs: list[Array]) -> float:
    """Return the largest difference of all rows, each relative to the row's largest number."""
    return worst([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
