"""The step depth: what passes, what is caught, and which side it calls the coarser one."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import COLUMNS, Table, tabulate
from latentrt_export.verify import steps as module
from latentrt_export.verify.steps import EXACT_BOUND, NO_DIFFUSERS_TWIN, STEP_BOUND, step_checks, table_checks
from tests.support.sampling.scheduler_configs import EMOJI, SD15

pytestmark = pytest.mark.filterwarnings(  # diffusers hands torch tensors to numpy
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)

NAMES = [name for name in SOLVERS if name not in NO_DIFFUSERS_TWIN]
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
EPSILON = {"prediction_type": "epsilon"}
ZERO_SNR_V = {**ZERO_SNR, "prediction_type": "v_prediction"}
SCHEDULES: dict[str, dict[str, Any]] = {"scaled_linear": {}, "linear": LINEAR, "cosine": COSINE, "zero_snr": ZERO_SNR_V}
WEIGHTS = [index for index, name in enumerate(COLUMNS) if name in ("c_in", "a", "o", "c") or name[0] == "b"]
ON_SD15 = Schedule.from_config(SD15)


def test_the_embedded_schedule() -> None:
    checks = list(step_checks(Schedule.from_config(EMOJI), 20))
    assert [check.what for check in checks] == [name for name in NAMES for _ in range(2)]
    assert [check for check in checks if not check.passed or check.note] == []


@pytest.mark.parametrize("steps", [2, 30, pytest.param(250, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_solver(name: str, steps: int) -> None:
    checks = list(step_checks(Schedule.from_config({**SD15, **SCHEDULES[name]}), steps))
    assert [check for check in checks if check.passed is False] == []
    assert {check.what for check in checks if check.passed is None} == ({"lcm", "tcd"} if steps > 50 else set())
    exact = [check for check in checks if check.measure.startswith("float64")]
    assert {check.bound for check in exact} == {EXACT_BOUND}
    assert len(exact) == sum(check.passed is True for check in checks) / 2
    beyond = [check for check in checks if check.measure.startswith("float32") and check.bound > STEP_BOUND]
    assert all("diffusers is the coarser side" in check.note for check in beyond)


@pytest.mark.parametrize("options", [{"use_lu_lambdas": True}, {"interpolation_type": "log_linear"}])
def test_grids_of_float32_logarithms(options: dict[str, Any]) -> None:
    checks = list(step_checks(Schedule.from_config({**SD15, **options}), 20))
    assert [check for check in checks if not check.passed] == []
    assert max(check.value or 0 for check in checks if check.measure.startswith("float64")) > EXACT_BOUND


def test_two_steps_of_dpm2_ancestral() -> None:
    """sigma_down² is a difference of nearly equal numbers there, which diffusers takes in float32."""
    table = tabulate("dpm2-ancestral", ON_SD15, 2)
    exact, rounding = table_checks(table, ON_SD15)
    assert exact.passed
    assert exact.value is not None
    assert exact.value < 1e-12
    assert (rounding.passed, rounding.bound) == (True, STEP_BOUND)
    assert rounding.value is not None
    assert rounding.value < 1e-6
    assert rounding.note.startswith("diffusers is the coarser side: against float64, diffusers' float32 is off by 1.")


def test_diffusers_may_be_not_finite_in_float32() -> None:
    schedule = Schedule.from_config({**SD15, **COSINE})
    _, rounding = table_checks(tabulate("dpm2-ancestral", schedule, 2), schedule)
    assert rounding.passed
    assert "diffusers' float32 is not finite, the table's is off by" in rounding.note


@pytest.mark.parametrize("steps", [2, pytest.param(12, marks=pytest.mark.slow)])
@pytest.mark.parametrize("solver", NAMES)
def test_a_wrong_coefficient_is_caught(solver: str, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone, off by 1e-5 of itself; one may be missed, with a weight so small that the latents hardly change."""
    monkeypatch.setattr(module, "rounding_check", lambda *_: None)
    table = tabulate(solver, ON_SD15, steps)
    missed = []
    for row, column in itertools.product({0, 1, len(table) // 2, len(table) - 1}, WEIGHTS):
        array = table.array.copy()
        array[row, column] *= 1 + 1e-5
        if not array[row, column]:
            continue
        exact, _ = table_checks(dataclasses.replace(table, array=array), ON_SD15)
        if exact.passed:
            missed.append(abs(array[row, column]))
    assert len(missed) <= 1
    assert all(weight < 0.03 for weight in missed)


@pytest.mark.parametrize("change", [lambda a: a[:-1], lambda a: np.concatenate([a, a[-1:]])])
def test_a_row_too_many_or_too_few_is_caught(change: Callable[[np.ndarray], np.ndarray]) -> None:
    table = tabulate("euler", ON_SD15, 5)
    (check,) = table_checks(dataclasses.replace(table, array=change(table.array)), ON_SD15)
    assert (check.passed, check.value) == (False, 1)


@pytest.mark.parametrize(("error", "note"), [(5e-6, ""), (5e-5, "the table is the coarser side")])
def test_rounding_of_ours_is_not_called_theirs(error: float, note: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_table = module.run_table

    def rounded(table: Table, network: Any, dtype: Any) -> list[np.ndarray]:
        return [x * dtype(1 + error) if dtype is np.float32 else x for x in run_table(table, network, dtype)]

    monkeypatch.setattr(module, "run_table", rounded)
    exact, rounding = table_checks(tabulate("euler", ON_SD15, 5), ON_SD15)
    assert exact.passed
    assert rounding.passed is not bool(note)
    assert rounding.note.startswith(note)
    assert bool(rounding.note) == bool(note)


def test_one_nan_row_in_the_middle_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    run_table = module.run_table

    def broken(*arguments: Any) -> list[np.ndarray]:
        return [np.full_like(x, np.nan) if index == 2 else x for index, x in enumerate(run_table(*arguments))]

    monkeypatch.setattr(module, "run_table", broken)
    checks = list(table_checks(tabulate("euler", ON_SD15, 5), ON_SD15))
    assert [check.passed for check in checks] == [False, False]
    assert all(check.value is not None and np.isnan(check.value) for check in checks)


TRAILING_61 = "trailing spacing makes a rounding error and 62 steps"


@pytest.mark.parametrize(
    ("config", "steps", "note", "solvers"),
    [
        ({"original_inference_steps": 10}, 12, "12 steps of 10", {"lcm", "tcd"}),
        ({"prediction_type": "sample"}, 12, "'sample'", {"pndm", "euler-ancestral", "dpm2", "dpm2-ancestral"}),
        (ZERO_SNR, 12, "no signal", {"ddim", "ddpm", "lcm", "tcd"}),
        (ZERO_SNR_V, 12, "", set()),
        ({"timestep_spacing": "trailing", "original_inference_steps": 100}, 61, TRAILING_61, {*NAMES} - {"lcm", "tcd"}),
        ({"solver_type": "bh1"}, 6, "not finite, in float64 either", {"unipc", "unipc-3"}),
    ],
)
def test_what_is_not_served_or_compared_neither_passes_nor_fails(
    config: dict[str, Any], steps: int, note: str, solvers: set[str]
) -> None:
    checks = list(step_checks(Schedule.from_config({**EMOJI, **EPSILON, **config}), steps))
    left = [check for check in checks if check.passed is None]
    assert {check.what for check in left} == solvers
    assert all(check.value is None and note in check.note for check in left)
    assert [check for check in checks if check.passed is False] == []
