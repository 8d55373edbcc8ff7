"""Every solver, spacing, prediction type and option against diffusers' schedulers, fed the same outputs, all steps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import tabulate
from tests.support.sampling.scheduler_configs import BASES, SD15, SDXL
from tests.support.sampling.scheduler_oracle import follow, walk

pytestmark = pytest.mark.filterwarnings(  # diffusers passes torch tensors to numpy
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)

SHIPPED = 1e-5  # of float32 tables from schedulers as they are: this project's promise
EXACT = 1e-9  # of float64 tables from schedulers in float64: 2e-10 with cosine betas (sigma is 20 000), else 1e-12
COARSE_GRID = 1e-6  # the same, where diffusers makes the sigmas themselves from float32 logarithms
TIMESTEP = 1e-3  # of timesteps looked up by float32 logarithms of sigma; whole timesteps are equal

WITHOUT_DIFFUSERS = {"dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion"}  # tests/sampling/test_solvers.py has their oracle
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


LINSPACE = {"timestep_spacing": "linspace"}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
TRAINED = {"trained_betas": np.linspace(0.0001, 0.03, 1000).tolist()}


@dataclass(frozen=True)
class Inexact:
    """Where diffusers' own float32 is coarser than 1e-5: `measured` is its distance from a table (inf: it gives NaN).

    The float32 table is compared with the float64 scheduler there, and `table` is its bound.
    """

    solver: str
    steps: tuple[int, ...]
    options: Options
    measured: float
    table: float = SHIPPED

    def covers(self, solver: str, steps: int, options: Options) -> bool:
        return solver == self.solver and steps in self.steps and self.options.items() <= options.items()


INEXACT = [
    # From sigma = 4096, x + (sigma' - sigma) * slope leaves little of x and all of its rounding.
    Inexact("euler", (2, 5), ZERO_SNR_V, 1.2e-4),
    Inexact("euler-ancestral", (2, 5), ZERO_SNR_V, 2.4e-4),
    # The second slope is (x - (x - sigma * out)) / sigma at the lowest sigma, after a step from the highest.
    Inexact("heun", (2,), LINSPACE, 1.0e-5),
    Inexact("heun", (2,), {"steps_offset": 0}, 1.0e-5),  # linspace too: the class' own spacing
    Inexact("heun", (2,), LINEAR, 3.1e-4),
    Inexact("heun", (2,), TRAINED, 5.3e-3),
    Inexact("heun", (2, 10), COSINE, 6.2e-2),
    Inexact("dpm2", (2,), TRAINED, 1.2e-5),
    Inexact("dpm2", (2,), COSINE, 6.1e-5),
    # A clipped x0 must be remembered as float32 has it, so that this table suffers as well.
    Inexact("heun", (2,), {"clip_sample": True}, 2.3e-4, table=5e-5),
    # sigma_down² is sigma'² - sigma_up², two numbers that nearly cancel: it may even come out negative.
    Inexact("dpm2-ancestral", (2,), LINSPACE, 1.0e-4),
    Inexact("dpm2-ancestral", (2,), {"steps_offset": 0}, 1.5e-5),
    Inexact("dpm2-ancestral", (2,), LINEAR, np.inf),
    Inexact("dpm2-ancestral", (2,), TRAINED, np.inf),
    Inexact("dpm2-ancestral", (2, 10), COSINE, np.inf),
    # One step's beta is 1 minus the ratio of two neighbouring levels.
    Inexact("ddpm", (1000,), {}, 2.4e-5),
    # Steps in lambda are differences of float32 logarithms; the third order divides by them twice.
    Inexact("dpmpp-3m-sde", (50,), {}, 1.1e-5),
    Inexact("dpmpp-3m-sde", (16, 20), BETA, 8.0e-5),
    # x0 = (x - sigma * out) / alpha with alpha = 5e-5 keeps three digits, in diffusers' memory and in ours.
    Inexact("dpmpp-3m", (20,), {**BETA, **COSINE}, 2.3e-5, table=2e-5),
]


def check(solver: str, steps: int, base: Mapping[str, Any] = SD15, **options: Any) -> None:
    """Compare a table with its diffusers scheduler, exactly and as shipped."""
    where = f"{solver}, {steps} steps, {options}"
    table = tabulate(solver, Schedule.from_config(base), steps, **options)
    run = walk(solver, base, steps, exact=True, outputs="random", **options)
    exact = follow(table, run, dtype=np.float64)
    coarse = "use_lu_lambdas" in options or options.get("interpolation_type") == "log_linear"
    assert exact.worst <= (COARSE_GRID if coarse else EXACT), f"exact: {exact}, {where}"
    run = walk(solver, base, steps, exact=False, outputs="network", **options)
    shipped = follow(table, run, dtype=np.float32)
    known = next((case for case in INEXACT if case.covers(solver, steps, options)), None)
    if known is None:
        assert shipped.worst <= SHIPPED, f"as shipped: {shipped}, {where}"
        assert shipped.timesteps <= (TIMESTEP if run.timesteps.is_floating_point() else 0), f"{shipped}, {where}"
    else:
        run = walk(solver, base, steps, exact=True, outputs="network", **options)
        ours = follow(table, run, dtype=np.float32)
        assert ours.worst <= known.table, f"float32 table, exact scheduler: {ours}, {where}"
        assert shipped.worst <= 2 * known.measured, f"as shipped: {shipped}, {where}"


def named(*groups: tuple[list[str], list[Options]]) -> list[Any]:
    """Return test parameters (solver, options) with readable ids."""
    return [
        pytest.param(
            solver, options, id=f"{solver}-{'-'.join(f'{k}={short(v)}' for k, v in options.items()) or 'plain'}"
        )
        for solvers, choices in groups
        for solver, options in itertools.product(solvers, choices)
    ]


def short(value: Any) -> str:
    return f"{len(value)} values" if isinstance(value, list) and len(value) > 9 else str(value)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(
    ("solver", "sigmas"),
    named(([*IN_TIMESTEPS, "euler-ancestral"], [{}]), (IN_SIGMA + UNIPC, [{}, *RESPACED]), (DPM, [{}, *RESPACED, LU])),
)
def test_solver_by_spacing_by_prediction_by_sigmas(solver: str, sigmas: Options, spacing: str, prediction: str) -> None:
    if prediction == "sample" and solver in NO_SAMPLE:
        pytest.skip("diffusers refuses it, and so do we: test_what_diffusers_refuses_is_refused")
    for steps in (2, 16) if sigmas else (1, 4, 20):
        check(solver, steps, timestep_spacing=spacing, prediction_type=prediction, **sigmas)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("solver", NAMES)
def test_config_of_another_class(solver: str, base: str) -> None:
    check(solver, 6, BASES[base])


@pytest.mark.parametrize(
    ("spacing", "steps"),
    [
        *((spacing, steps) for spacing in SPACINGS for steps in (2, 3, 7)),
        *(("leading", 50), ("trailing", 15), ("trailing", 30), ("linspace", 14), ("linspace", 33)),
    ],
)
@pytest.mark.parametrize("solver", NAMES)
def test_number_of_steps(solver: str, spacing: str, steps: int) -> None:
    check(solver, steps, timestep_spacing=spacing)


@pytest.mark.parametrize(
    ("solver", "steps"), [("ddim", 1000), ("ddpm", 1000), ("pndm", 500), ("euler", 1000), ("unipc", 333)]
)
def test_many_steps(solver: str, steps: int) -> None:
    check(solver, steps, steps_offset=0)


@pytest.mark.parametrize(
    ("solver", "key", "value"),
    [
        *((solver, "sigma_max", 10.0) for solver in ("heun", "dpm2", "dpm2-ancestral", *DPM)),
        *((solver, "solver_type", kind) for solver in DPM for kind in ("bh1", "bh2", "logrho")),
        *((solver, "solver_type", kind) for solver in UNIPC for kind in ("midpoint", "heun", "logrho")),
        ("lms", "sigma_max", 10.0),
        ("tcd", "clip_sample", True),
        ("tcd", "thresholding", True),
    ],
)
def test_key_of_another_class_in_the_config(solver: str, key: str, value: Any) -> None:
    sigmas = {} if solver == "tcd" else KARRAS
    check(solver, 6, {**SDXL, **sigmas, key: value})


@pytest.mark.parametrize(
    "betas",
    [
        LINEAR,
        COSINE,
        TRAINED,
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
