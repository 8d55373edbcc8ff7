"""Every solver, spacing, prediction type and option against diffusers' scheduler, fed the same outputs, at every step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from scheduler_oracle import BASES, SD15, SDXL, follow, scheduler, walk

from engine.errors import LatentrtError, ScheduleError
from engine.schedule import Schedule
from engine.solvers import SOLVERS
from engine.table import tabulate

pytestmark = pytest.mark.filterwarnings(  # diffusers hands torch tensors to numpy
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)

SHIPPED = 1e-5  # of a float32 table from a float32 scheduler, the project's promise
EXACT = 1e-9  # of a float64 table from a float64 scheduler; 1e-13 but for squared cosine betas (sigma up to 20 000)
TIMESTEP = 2e-4  # of timesteps that are looked up by the float32 logarithm of sigma

WITHOUT_DIFFUSERS = {"dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion"}  # tests/test_solvers.py has their oracle
NAMES = [name for name in SOLVERS if name not in WITHOUT_DIFFUSERS]
IN_TIMESTEPS = ["ddim", "ddpm", "pndm", "lcm", "tcd"]
IN_SIGMA = ["euler", "heun", "dpm2", "dpm2-ancestral", "lms"]
DPM = ["dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "dpmpp-3m-sde"]
UNIPC = ["unipc", "unipc-3"]
SPACINGS = ["leading", "trailing", "linspace"]
PREDICTIONS = ["epsilon", "v_prediction", "sample"]
NO_SAMPLE = {"pndm", "euler-ancestral", "dpm2", "dpm2-ancestral"}  # diffusers refuses prediction_type "sample" there

Options = dict[str, Any]
KARRAS, EXPONENTIAL, BETA = ({f"use_{kind}_sigmas": True} for kind in ("karras", "exponential", "beta"))
LU = {"use_lu_lambdas": True}
RESPACED = [KARRAS, EXPONENTIAL, BETA]
BOUNDS = {"sigma_min": 0.1, "sigma_max": 10.0}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {"rescale_betas_zero_snr": True}
ZERO_SNR_V = {**ZERO_SNR, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Inexact:
    """Where diffusers' float32 is too coarse for 1e-5: `measured` is its distance from a table.

    The table is held to 1e-5 of the float64 scheduler there instead.
    """

    solver: str
    steps: tuple[int, ...]
    options: Options
    measured: float
    reason: str

    def covers(self, solver: str, steps: int, options: Mapping[str, Any]) -> bool:
        return solver == self.solver and steps in self.steps and self.options.items() <= options.items()


INEXACT: list[Inexact] = []


def check(solver: str, steps: int, base: Mapping[str, Any] = SD15, **options: Any) -> None:
    """Hold one table to its diffusers scheduler, exactly and as shipped."""
    where = f"{solver} {steps} {options}"
    table = tabulate(solver, Schedule.from_config(base), steps, **options)
    exact = follow(table, walk(solver, base, steps, exact=True, outputs="random", **options), dtype=np.float64, exact=True)
    print("@E", exact.worst, where)
    run = walk(solver, base, steps, exact=False, outputs="network", **options)
    shipped = follow(table, run, dtype=np.float32, exact=False)
    print("@S", shipped.worst, where)
    whole = not run.timesteps.is_floating_point()
    print("@T" if not whole else "@W", shipped.timesteps, where)
    run = walk(solver, base, steps, exact=True, outputs="network", **options)
    print("@O", follow(table, run, dtype=np.float32, exact=True).worst, where)


def named(*groups: tuple[list[str], list[Options]]) -> list[Any]:
    """Test parameters (solver, options) with readable ids."""
    return [
        pytest.param(solver, options, id=f"{solver}-{'-'.join(f'{k}={short(v)}' for k, v in options.items()) or 'plain'}")
        for solvers, choices in groups
        for solver, options in itertools.product(solvers, choices)
    ]


def short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 9 else str(value)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("solver", "sigmas"),
    named(
        ([*IN_TIMESTEPS, "euler-ancestral"], [{}]), (IN_SIGMA + UNIPC, [{}, *RESPACED]), (DPM, [{}, *RESPACED, LU])
    ),
)
def test_solver_by_spacing_by_prediction_by_sigmas(
    solver: str, sigmas: Options, spacing: str, prediction: str
) -> None:
    if prediction == "sample" and solver in NO_SAMPLE:
        pytest.skip("diffusers refuses it, and so do we: test_what_diffusers_refuses_is_refused")
    for steps in (1, 4, 20):
        check(solver, steps, timestep_spacing=spacing, prediction_type=prediction, **sigmas)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("solver", NAMES)
def test_config_of_another_class(solver: str, base: str) -> None:
    check(solver, 6, BASES[base])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("solver", NAMES)
def test_number_of_steps(solver: str, spacing: str) -> None:
    for steps in (2, 3, 7, 15, 30, 33, 50):
        check(solver, steps, timestep_spacing=spacing)


@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        COSINE,
        {"trained_betas": np.linspace(0.0001, 0.03, 1000).tolist()},
        {"num_train_timesteps": 500},
        {"steps_offset": 0},
    ],
    ids=lambda betas: "-".join(f"{k}={short(v)}" for k, v in betas.items()),
)
@pytest.mark.parametrize("solver", NAMES)
def test_training_schedule(solver: str, betas: Options) -> None:
    for steps in (2, 10):
        check(solver, steps, **betas)


SINGLE_OPTIONS = named(
    (
        ["ddim"],
        [
            *({"eta": eta, "timestep_spacing": spacing} for eta in (0.5, 1.0) for spacing in SPACINGS),
            {"clip_sample": True},
            {"clip_sample": True, "clip_sample_range": 2.5, "eta": 0.7},
            {"set_alpha_to_one": True},
            {"set_alpha_to_one": True, "eta": 1.0},
            ZERO_SNR_V,
            {**ZERO_SNR, "timestep_spacing": "trailing", "prediction_type": "sample"},
            ZERO_SNR,
        ],
    ),
    (
        ["ddpm"],
        [
            *({"variance_type": kind} for kind in ("fixed_small", "fixed_small_log", "fixed_large")),
            {"clip_sample": True},
            {"clip_sample": True, "clip_sample_range": 2.0},
            ZERO_SNR_V,
            ZERO_SNR,
        ],
    ),
    (["pndm"], [{"set_alpha_to_one": True}]),
    (
        ["lcm"],
        [
            {"original_inference_steps": 100},
            {"original_inference_steps": 37},
            {"timestep_scaling": 1.0},
            {"clip_sample": True},
            {"set_alpha_to_one": False},
            {**ZERO_SNR, "prediction_type": "v_prediction"},
        ],
    ),
    (
        ["tcd"],
        [
            {"eta": 0.0},
            {"eta": 0.05},
            {"eta": 1.0},
            {"original_inference_steps": 100},
            {"original_inference_steps": 1000},
            {**ZERO_SNR, "prediction_type": "v_prediction"},
        ],
    ),
    (
        ["euler"],
        [
            BOUNDS,
            TO_SIGMA_MIN,
            *({**kind, **TO_SIGMA_MIN} for kind in RESPACED),
            *({**kind, **BOUNDS} for kind in RESPACED),
            {"interpolation_type": "log_linear"},
            {"interpolation_type": "log_linear", **TO_SIGMA_MIN},
            {"interpolation_type": "log_linear", **KARRAS},
            {"timestep_type": "continuous"},
            {"timestep_type": "continuous", "prediction_type": "v_prediction"},
            {"timestep_type": "continuous", "prediction_type": "v_prediction", **KARRAS, **BOUNDS},
        ],
    ),
    (["euler", "euler-ancestral", *DPM, *UNIPC], [ZERO_SNR, ZERO_SNR_V]),
    (["heun"], [{"clip_sample": True}, {"clip_sample": True, "clip_sample_range": 3.0}]),
    (["lms"], [{"order": order} for order in (1, 2, 3)]),
    (
        DPM,
        [
            TO_SIGMA_MIN,
            *({**kind, **COSINE} for kind in (*RESPACED, LU)),
            {"solver_type": "heun"},
            {"solver_type": "heun", **TO_SIGMA_MIN},
            {"lower_order_final": False},
            {"lower_order_final": False, **TO_SIGMA_MIN},
            {"euler_at_final": True},
            {"euler_at_final": True, "lower_order_final": False, **TO_SIGMA_MIN},
            *({"lambda_min_clipped": -5.1, "timestep_spacing": spacing, **COSINE} for spacing in SPACINGS),
            {"lambda_min_clipped": -1.0},
            {"solver_order": 1},
        ],
    ),
    (
        UNIPC,
        [
            TO_SIGMA_MIN,
            *({**kind, **COSINE} for kind in RESPACED),
            *({**kind, **TO_SIGMA_MIN} for kind in RESPACED),
            *({**kind, **BOUNDS} for kind in RESPACED),
            {"solver_type": "bh1", **TO_SIGMA_MIN},
            {"solver_type": "bh1", "lower_order_final": False, **TO_SIGMA_MIN},
            {"lower_order_final": False, **TO_SIGMA_MIN},
            {"disable_corrector": [0]},
            {"disable_corrector": [0, 1, 3]},
            {"solver_order": 1},
        ],
    ),
)


@pytest.mark.parametrize(("solver", "options"), SINGLE_OPTIONS)
def test_option(solver: str, options: Options) -> None:
    for steps in (2, 5, 20):
        check(solver, steps, **options)
