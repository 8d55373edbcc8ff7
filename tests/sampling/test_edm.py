"""EDM schedules (sigmas in place of betas): every solver's table against its diffusers scheduler."""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import numpy as np
import pytest

from latentrt.errors import NotServedError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.settings import EDM_DEFAULTS
from latentrt.sampling.solvers import EDM_SOLVERS, SOLVERS, solvers_of
from latentrt.sampling.table import tabulate
from latentrt_export.verify.steps import step_checks
from tests.support.sampling.scheduler_configs import SD15

COSXL = {"sigma_min": 0.002, "sigma_max": 120.0, "sigma_data": 1.0, "prediction_type": "v_prediction"}
PLAYGROUND = {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "prediction_type": "epsilon"}


@pytest.mark.parametrize("scheduler", EDM_DEFAULTS)
@pytest.mark.parametrize(
    ("model", "more"),
    list(
        itertools.product(
            (COSXL, PLAYGROUND),
            ({}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min", "rho": 5.0}),
        )
    ),
)
def test_every_solver(scheduler: str, model: dict[str, Any], more: dict[str, Any]) -> None:
    checks = list(step_checks(Schedule.from_config({"_class_name": scheduler, **model, **more}), 12))
    assert [check.what for check in checks] == [name for name in EDM_SOLVERS for _ in range(2)]
    assert [check for check in checks if not check.passed] == []


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_first_latents_and_levels_are_those_of_diffusers(strength: float) -> None:
    config = {"_class_name": "EDMEulerScheduler", **COSXL}
    table = tabulate(None, Schedule.from_config(config), 10, strength=strength)
    theirs = diffusers.EDMEulerScheduler.from_config(config)
    theirs.set_timesteps(10)
    first = 10 - len(table)
    assert table.solver == "edm-euler"
    assert table.start == pytest.approx(theirs.init_noise_sigma)
    assert table.timesteps == pytest.approx(theirs.timesteps[first:].numpy(), rel=1e-6)
    np.testing.assert_allclose(table.known[:-1], [(1.0, float(sigma)) for sigma in theirs.sigmas[first:-1]], rtol=1e-6)


def test_a_kind_of_model_has_its_solvers() -> None:
    assert solvers_of(Schedule.from_config({"_class_name": "EDMEulerScheduler", **COSXL})) is EDM_SOLVERS
    assert solvers_of(Schedule.from_config(SD15)) is SOLVERS


def test_other_solvers_and_other_schedules_are_refused() -> None:
    schedule = Schedule.from_config({"_class_name": "EDMEulerScheduler", **COSXL})
    for solver in SOLVERS:
        with pytest.raises(NotServedError, match="on the schedule of EDMEulerScheduler"):
            tabulate(solver, schedule, 5)
    for solver in EDM_SOLVERS:
        with pytest.raises(NotServedError, match=r"on the schedule of PNDMScheduler\. Needed: an EDM model"):
            tabulate(solver, Schedule.from_config(SD15), 5)
    with pytest.raises(NotServedError, match="an EDM model's schedule"):
        schedule.alphas_cumprod(schedule.settings("EDMEulerScheduler"))


@pytest.mark.parametrize(
    ("key", "value"), [("sigma_data", "x"), ("sigma_min", 0), ("sigma_schedule", "beta"), ("rho", None)]
)
def test_values_of_another_kind_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=key):
        Schedule.from_config({"_class_name": "EDMEulerScheduler", **COSXL, key: value})
