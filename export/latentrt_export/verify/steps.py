"""The second depth: every solver's table against its diffusers scheduler."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from latentrt.errors import RequestError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import advance, tabulate
from latentrt_export.verify.checks import Array, Check, difference, not_served, worst
from latentrt_export.verify.reference import comparing, diffusers_scheduler, run_scheduler, stand_in

STEP_BOUND = 1e-5  # relative to the largest latent, at every step
STEP_DEPTH_STEPS = 100
COARSE_AT_ZERO_SNR = ("euler", "euler-ancestral")
NO_DIFFUSERS_TWIN = ("dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion")


def step_checks(schedule: Schedule, steps: int) -> Iterator[Check]:
    """Measure every solver's table on this schedule against its diffusers scheduler, with one stand-in for a network.

    At 100 steps at most: over closer levels diffusers' own float32 reaches the bound (its third-order SDE solver is off
    by 1.1e-5 at 200 steps, and agrees to 1e-13 in float64: tests/sampling/test_scheduler_parity.py).
    """
    steps = min(steps, STEP_DEPTH_STEPS)
    for name, solver in SOLVERS.items():
        if name in NO_DIFFUSERS_TWIN:
            continue
        what = f"{name}: {solver.scheduler}"
        if name in COARSE_AT_ZERO_SNR and schedule.config.get("rescale_betas_zero_snr"):
            note = "diffusers' own float32 is coarser than the bound where sigma starts at 4096"
            yield Check("step", what, "not compared", None, STEP_BOUND, note=note)
            continue
        try:
            ours = list(run_table(name, schedule, steps))
        except (ScheduleError, RequestError) as error:
            yield not_served("step", what, STEP_BOUND, error)
            continue
        with comparing(solver.scheduler):
            theirs = list(run_scheduler(diffusers_scheduler(name, schedule), steps))
        largest = worst([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
        yield Check("step", what, f"worst of {len(ours)} rows", largest, STEP_BOUND)


def run_table(name: str, schedule: Schedule, steps: int, shape: Sequence[int] = (1, 4, 8, 8)) -> Iterator[Array]:
    """Yield our latents after every row, with `stand_in` for a network and noise drawn by a seed."""
    table = tabulate(name, schedule, steps)
    noises = torch.Generator().manual_seed(2)
    x = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(table.start)
    memory = np.zeros((4, *shape), np.float32)
    for row in table.rows:
        noise = torch.randn(shape, generator=noises).numpy() if row.c else None
        x = advance(row, x, stand_in(np.float32(row.c_in) * x), memory, noise)
        yield x
