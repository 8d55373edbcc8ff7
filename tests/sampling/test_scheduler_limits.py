"""Options that diffusers has and tables lack, what both refuse, and where diffusers' result should not be matched."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from latentrt.errors import LatentrtError, ScheduleError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.settings import DEFAULTS
from latentrt.sampling.table import preview, tabulate
from tests.support.sampling.scheduler_configs import SD15
from tests.support.sampling.scheduler_oracle import follow, scheduler, walk

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning",
    "ignore:__array_wrap__:DeprecationWarning",
    "ignore:.*dpmsolver.*deprecated:FutureWarning",
)
SCHEDULE = Schedule.from_config(SD15)

# (solver, option, value, why a table lacks it). Arguments that are no options of a class are not served either:
# lists of timesteps or sigmas of one's own, s_churn, use_clipped_model_output.
QUANTILE = "a quantile of each picture is no linear combination"
LEARNED = "such networks return two things, and no latent model is one"
FLOW = "flow matching is another family of models"
DEPRECATED = "diffusers itself drops it in its next major version"
UNUSED = "no published latent model was trained with it"
NOT_SERVED: list[tuple[str, str, Any, str]] = [
    *((solver, "thresholding", True, QUANTILE) for solver in ("ddim", "ddpm", "lcm", "dpmpp-2m", "unipc")),
    *(("ddpm", "variance_type", kind, LEARNED) for kind in ("learned", "learned_range")),
    *(("dpmpp-2m", "variance_type", kind, LEARNED) for kind in ("learned", "learned_range")),
    ("ddpm", "variance_type", "fixed_large_log", "diffusers takes the root of a negative number there"),
    ("pndm", "skip_prk_steps", False, "four Runge-Kutta calls a step need six memories"),
    ("unipc", "solver_p", "DDIMScheduler", "a second scheduler with a state of its own"),
    ("unipc", "predict_x0", False, "no published setting has it"),
    ("unipc", "solver_order", 4, "it needs five memories"),
    ("lms", "order", 5, "it needs five memories"),
    *((solver, "use_flow_sigmas", True, FLOW) for solver in ("dpmpp-2m", "unipc")),
    *((solver, "use_dynamic_shifting", True, FLOW) for solver in ("dpmpp-2m", "unipc")),
    *((solver, "prediction_type", "flow_prediction", FLOW) for solver in ("dpmpp-2m", "unipc")),
    ("unipc", "shift_terminal", 0.1, FLOW),
    *(("dpmpp-2m", "algorithm_type", kind, DEPRECATED) for kind in ("dpmsolver", "sde-dpmsolver")),
    *(("ddpm", "beta_schedule", kind, UNUSED) for kind in ("sigmoid", "laplace")),
    ("heun", "beta_schedule", "exp", UNUSED),
    ("tcd", "clip_sample", True, "diffusers has the option and never clips"),
]


def _words(value: Any) -> str:
    return "-".join(f"{k}={v}" for k, v in value.items()) or "plain" if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("solver", "option", "value", "reason"), NOT_SERVED, ids=_words)
def test_what_a_table_cannot_hold_is_refused_by_name(solver: str, option: str, value: Any, reason: str) -> None:
    with pytest.raises(ScheduleError, match=option):
        tabulate(solver, SCHEDULE, 4, **{option: value})


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_option_of_diffusers_is_known(name: str) -> None:
    """So that NOT_SERVED is the whole list: all other options are served, with diffusers' defaults."""
    theirs = dict(getattr(diffusers, name)().config)
    ignored = {"clip_sample", "clip_sample_range", "thresholding", "dynamic_thresholding_ratio", "sample_max_value"}
    for key, default in theirs.items():
        if name == "TCDScheduler" and key in ignored:  # see NOT_SERVED
            assert key not in DEFAULTS[name]
        elif not key.startswith("_"):
            assert DEFAULTS[name][key] == default, key


SAMPLE = {"prediction_type": "sample"}
TO_SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
KARRAS = {"use_karras_sigmas": True}
NO_SIGNAL = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
# (solver, steps, options): diffusers raises an error or gives latents that are not numbers; we raise one of ours.
BOTH_REFUSE: list[tuple[str, int, dict[str, Any]]] = [
    *((solver, 4, SAMPLE) for solver in ("pndm", "euler-ancestral", "dpm2", "dpm2-ancestral")),
    *((solver, 1001, {}) for solver in ("ddim", "ddpm", "lcm", "tcd")),
    *((solver, 1000, {"timestep_spacing": "leading"}) for solver in ("ddim", "ddpm", "pndm")),  # timestep 1000 of 999
    *((solver, 51, {}) for solver in ("lcm", "tcd")),  # of 50 that the model was distilled on
    *((solver, 4, {"original_inference_steps": 2000}) for solver in ("lcm", "tcd")),
    *((solver, 4, NO_SIGNAL) for solver in ("ddim", "ddpm", "lcm", "tcd")),  # epsilon / 0 at the first step
    *((solver, 4, {**KARRAS, "use_beta_sigmas": True}) for solver in ("euler", "heun", "lms", "dpmpp-2m", "unipc")),
    # A step of no length divides by it: twice the same sigma in a row.
    *((solver, 1000, {}) for solver in ("dpmpp-2m", "dpmpp-3m-sde", "unipc", "unipc-3")),
    *((solver, 20, {**KARRAS, **TO_SIGMA_MIN}) for solver in ("dpmpp-3m", "dpmpp-3m-sde")),
    ("dpmpp-2m", 20, {**KARRAS, **TO_SIGMA_MIN, "solver_type": "heun"}),
    ("unipc-3", 4, {**KARRAS, **TO_SIGMA_MIN, "lower_order_final": False}),
    # The last step to no noise is infinitely long in lambda and wants order 1.
    *((solver, 4, {"lower_order_final": False}) for solver in ("unipc", "unipc-3")),
    ("ddim", 4, {"prediction_type": "velocity"}),
    ("ddim", 4, {"timestep_spacing": "even"}),
    ("ddim", 4, {"beta_schedule": "cosine"}),
    ("euler", 4, {"final_sigmas_type": "one"}),
    ("euler", 4, {"interpolation_type": "cubic"}),
    ("dpmpp-2m", 4, {"solver_type": "euler"}),
    ("dpmpp-2m", 4, {"algorithm_type": "dpmsolver+++"}),
    ("unipc", 4, {"solver_type": "bh3"}),
]


@pytest.mark.parametrize(("solver", "steps", "options"), BOTH_REFUSE, ids=_words)
def test_where_diffusers_fails_we_say_why(solver: str, steps: int, options: dict[str, Any]) -> None:
    with pytest.raises(LatentrtError, match=r"Needed: .* To fix it: "):
        tabulate(solver, SCHEDULE, steps, **options)
    with np.errstate(all="ignore"):
        assert not _finite_in_diffusers(solver, steps, options)


def _finite_in_diffusers(solver: str, steps: int, options: dict[str, Any]) -> bool:
    try:
        run = walk(solver, SD15, steps, exact=False, outputs="network", **options)
    except (ValueError, IndexError, NotImplementedError, torch.linalg.LinAlgError):
        return False
    return bool(np.isfinite(run.latents[-1]).all())


@pytest.mark.parametrize("final", ["zero", "sigma_min"])
@pytest.mark.parametrize("solver", ["unipc", "unipc-3"])
def test_bh1_ends_well(solver: str, final: str) -> None:
    """To no noise, diffusers multiplies B(h) = -infinity by an empty sum: NaN. The step itself is x0, as with bh2."""
    options = {"solver_type": "bh1", "final_sigmas_type": final}
    table = tabulate(solver, SCHEDULE, 6, **options)
    run = walk(solver, SD15, 6, exact=True, outputs="random", **options)
    assert np.isnan(run.latents[-1]).all() == (final == "zero")
    if final == "zero":
        row, x, out = table.rows[-1], np.float64(0.7), np.float64(-0.4)
        corrected = tabulate(solver, SCHEDULE, 6, solver_type="bh1", disable_corrector=[4]).rows[-1]
        assert row.u == corrected.a
        assert row.v == corrected.o
        assert preview(row, x, out) == pytest.approx(corrected.a * x + corrected.o * out)


@pytest.mark.parametrize("steps", [61, 103, 121])
@pytest.mark.parametrize("solver", ["ddim", "euler", "heun", "dpmpp-2m", "unipc"])
def test_trailing_has_as_many_steps_as_were_asked_for(solver: str, steps: int) -> None:
    """At these numbers numpy's `arange` has one entry more by rounding, and diffusers tells its network timestep -1."""
    theirs = scheduler(solver, SD15, timestep_spacing="trailing")
    theirs.set_timesteps(steps)
    whole = theirs.timesteps[1::2] if solver == "heun" else theirs.timesteps
    table = tabulate(solver, SCHEDULE, steps, timestep_spacing="trailing")
    ours = table.timesteps[1::2] if solver == "heun" else table.timesteps
    assert theirs.timesteps[-1] == -1
    assert len(table) == (2 * steps - 1 if solver == "heun" else steps)
    np.testing.assert_array_equal(ours, whole.numpy()[: len(ours)])


@pytest.mark.parametrize("solver", ["dpmpp-2m", "unipc"])
def test_equal_timesteps_are_no_hindrance(solver: str) -> None:
    """diffusers' text-to-image pipelines look up the first step by its timestep, and of two equal ones take the second.

    They end in an IndexError then. Their image-to-image pipelines set the index instead, and so does the oracle.
    """
    table = tabulate(solver, SCHEDULE, 50, use_beta_sigmas=True)
    assert table.timesteps[0] == table.timesteps[1] == 998
    run = walk(solver, SD15, 50, exact=False, outputs="network", use_beta_sigmas=True)
    assert follow(table, run, dtype=np.float32).worst < 1e-5
    theirs = scheduler(solver, SD15, use_beta_sigmas=True)
    theirs.set_timesteps(50)
    assert theirs.index_for_timestep(theirs.timesteps[0]) == 1


def test_a_fault_of_ours_is_not_called_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("latentrt.sampling.table.trace", broken)
    with pytest.raises(ValueError, match=r"^a bug$"):
        tabulate("ddim", SCHEDULE, 4)


@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("euler", {"interpolation_type": "log_linear", "beta_start": 1e-30}),
        ("dpmpp-2s-ancestral", {"use_exponential_sigmas": True, "beta_start": 1e-30}),
    ],
)
def test_a_schedule_that_ends_without_noise_has_no_logarithm(solver: str, options: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="has no finite coefficients"):
        tabulate(solver, SCHEDULE, 4, **options)
