"""Runs that begin on a given picture, and keep a part of it, against diffusers' schedulers in its pipelines' order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from latentrt.errors import RequestError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import tabulate
from tests.sampling.test_scheduler_parity import (
    BETA,
    COARSE_GRID,
    COSINE,
    EXACT,
    EXPONENTIAL,
    KARRAS,
    LU,
    NAMES,
    NO_SAMPLE,
    SHIPPED,
    SPACINGS,
    TIMESTEP,
    TO_SIGMA_MIN,
    Options,
    named,
)
from tests.support.sampling.scheduler_configs import SD15, SDXL
from tests.support.sampling.scheduler_oracle import follow, walk

pytestmark = pytest.mark.filterwarnings(  # diffusers passes torch tensors to numpy
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)
SERVED = [name for name in NAMES if name != "lms"]
STRENGTHS = [0.2, 0.55, 0.9, 1.0]
SCHEDULE = Schedule.from_config(SD15)


def check(solver: str, steps: int, strength: float, *, masked: bool, base: Options = SD15, **options: Any) -> None:
    """Compare a table with its diffusers scheduler from the same row on, exactly and as shipped."""
    where = f"{solver}, {steps} steps, strength {strength}, masked {masked}, {options}"
    table = tabulate(solver, Schedule.from_config(base), steps, strength=strength, **options)
    walked: Options = {"given": strength, "masked": masked, **options}
    run = walk(solver, base, steps, exact=True, outputs="random", **walked)
    exact = follow(table, run, dtype=np.float64)
    coarse = "use_lu_lambdas" in options or options.get("interpolation_type") == "log_linear"
    assert exact.worst <= (COARSE_GRID if coarse else EXACT), f"exact: {exact}, {where}"
    run = walk(solver, base, steps, exact=False, outputs="network", **walked)
    shipped = follow(table, run, dtype=np.float32)
    assert shipped.worst <= SHIPPED, f"as shipped: {shipped}, {where}"
    assert shipped.timesteps <= (TIMESTEP if run.timesteps.is_floating_point() else 0), f"{shipped}, {where}"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("solver", SERVED)
def test_strength_by_prediction(solver: str, masked: bool, strength: float, prediction: str) -> None:
    if prediction == "sample" and solver in NO_SAMPLE:
        pytest.skip("diffusers refuses it, and so do we")
    for steps in (5, 20):
        check(solver, steps, strength, masked=masked, prediction_type=prediction)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("solver", "sigmas"),
    named(
        (["ddim", "ddpm", "pndm", "lcm", "tcd", "euler-ancestral"], [{}]),
        (["euler", "heun", "dpm2", "dpm2-ancestral", "unipc", "unipc-3"], [{}, KARRAS, EXPONENTIAL, BETA]),
        (["dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "dpmpp-3m-sde"], [{}, KARRAS, EXPONENTIAL, BETA, LU]),
    ),
)
def test_spacing_by_sigmas(solver: str, sigmas: Options, spacing: str) -> None:
    for masked in (False, True):
        check(solver, 12, 0.6, masked=masked, base=SDXL, timestep_spacing=spacing, **sigmas)


@pytest.mark.parametrize(
    ("solver", "options"),
    named(
        (["ddim"], [{"eta": 0.7}, {"eta": 1.0, "clip_sample": True}, {"set_alpha_to_one": True}]),
        (["ddpm"], [{"variance_type": "fixed_large"}, {"clip_sample": True}]),
        (["pndm"], [{"set_alpha_to_one": True}]),
        (["lcm"], [{"original_inference_steps": 100}]),
        (["tcd"], [{"eta": 0.0}, {"eta": 1.0}]),
        (["euler"], [TO_SIGMA_MIN, {"interpolation_type": "log_linear", **KARRAS}]),
        (["heun"], [{"clip_sample": True, "clip_sample_range": 3.0}]),
        (["dpmpp-2m", "dpmpp-3m"], [TO_SIGMA_MIN, {"lower_order_final": False}, {"euler_at_final": True}, COSINE]),
        (["unipc", "unipc-3"], [{"disable_corrector": [0, 7, 9]}, {"lower_order_final": False, **TO_SIGMA_MIN}]),
    ),
)
def test_option(solver: str, options: Options) -> None:
    for steps in (14, 16):  # from 15 on diffusers' DPM-Solver++ keeps its order at the end
        check(solver, steps, 0.5, masked=True, **options)


@pytest.mark.parametrize("solver", SERVED)
def test_every_first_row(solver: str) -> None:
    """Exact only: wherever a run of 6 steps begins, to its last step alone."""
    for first in range(6):
        strength = min(1 - (first - 0.5) / 6, 1.0)
        table = tabulate(solver, SCHEDULE, 6, strength=strength)
        run = walk(solver, SD15, 6, exact=True, outputs="random", given=strength, masked=True)
        assert follow(table, run, dtype=np.float64).worst <= EXACT


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_of_a_run_is_the_run(solver: str) -> None:
    whole, same = tabulate(solver, SCHEDULE, 7), tabulate(solver, SCHEDULE, 7, strength=1)
    np.testing.assert_array_equal(whole.array, same.array)
    assert whole.known.shape == (len(whole) + 1, 2)
    assert whole.known[-1].tolist() == [1, 0]  # the kept part ends unchanged
    assert (np.diff(whole.known[:, 1] / whole.known[:, 0]) <= 0).all()


def test_lms_cannot_begin_midway() -> None:
    """diffusers weighs one slope as the first of four there: its step is 55/24 as long as it should be."""
    with pytest.raises(ScheduleError, match="lms cannot begin midway"):
        tabulate("lms", SCHEDULE, 20, strength=0.5)
    assert len(tabulate("lms", SCHEDULE, 20, strength=1.0)) == 20


@pytest.mark.parametrize("strength", [0, -0.1, 1.01, float("nan"), True, "0.5", None])
def test_a_strength_out_of_range_is_refused(strength: Any) -> None:
    with pytest.raises(RequestError, match="strength is"):
        tabulate("ddim", SCHEDULE, 20, strength=strength)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    with pytest.raises(RequestError, match=r"strength of 0.09 leaves none of 10 steps.*1 / 10"):
        tabulate("ddim", SCHEDULE, 10, strength=0.09)
