"""Schedules, their settings and their grids: configs that are read, configs that are refused, levels of a run."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import NotServedError, RequestError, ScheduleError
from latentrt.sampling.schedule import Point, Schedule
from latentrt.sampling.settings import _CHOICES, _PER_CLASS, _REFUSED, DEFAULTS, KNOWN_KEYS, class_of
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.spacing import CLEAN, Grid, Levels, _beta_quantile
from latentrt.sampling.table import tabulate
from tests.support.sampling.scheduler_configs import BASES, EMOJI, SD15, SDXL

pytestmark = pytest.mark.filterwarnings(  # diffusers passes torch tensors to numpy
    "ignore:__array__ implementation:DeprecationWarning", "ignore:__array_wrap__:DeprecationWarning"
)

SCHEDULE = Schedule.from_config(SD15)
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}


def grid_of(name: str, steps: int, base: dict[str, Any] = SD15, **options: Any) -> Grid:
    solver, schedule = SOLVERS[name], Schedule.from_config(base)
    return solver.grid(schedule, schedule.settings(solver.scheduler, **{**solver.settings, **options}), steps)


@pytest.mark.parametrize(
    "betas",
    [
        {},
        LINEAR,
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.0001, 0.03, 1000).tolist()},
        {"num_train_timesteps": 1},
        {"num_train_timesteps": 7},
        {"num_train_timesteps": 1100},
        {"beta_start": 0.00085, "beta_end": 0.0120},
        {**LINEAR, "beta_start": 0.0015, "beta_end": 0.0195},
    ],
)
def test_levels_are_diffusers_to_the_bit(betas: dict[str, Any]) -> None:
    theirs = diffusers.DDIMScheduler.from_config({**SD15, **betas}).alphas_cumprod
    ours = SCHEDULE.alphas_cumprod(SCHEDULE.settings("DDIMScheduler", **betas))
    np.testing.assert_array_equal(ours, theirs.double().numpy())


@pytest.mark.parametrize("betas", [{}, LINEAR, {"beta_schedule": "squaredcos_cap_v2"}])
def test_zero_terminal_snr(betas: dict[str, Any]) -> None:
    """To the bit of a square root, which torch does not always round as IEEE wants."""
    config = {**SD15, **betas, "rescale_betas_zero_snr": True}
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.double().numpy()
    ours = SCHEDULE.alphas_cumprod(SCHEDULE.settings("DDIMScheduler", **betas, rescale_betas_zero_snr=True))
    assert ours[-1] == 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_levels_are_made_once() -> None:
    chosen = SCHEDULE.settings("DDIMScheduler")
    assert SCHEDULE.alphas_cumprod(chosen) is SCHEDULE.alphas_cumprod(chosen)
    assert SCHEDULE.alphas_cumprod(chosen) is SCHEDULE.alphas_cumprod(SCHEDULE.settings("EulerDiscreteScheduler"))


@pytest.mark.parametrize(
    "betas",
    [
        {"trained_betas": [0.1, 0.2]},
        {"trained_betas": [0.0] * 1000},
        {"trained_betas": [1.5] * 1000},
        {"beta_end": 1.2},
        {"beta_start": -0.1, "beta_schedule": "linear"},
    ],
)
def test_betas_that_are_no_betas(betas: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match="the betas have shape"):
        SCHEDULE.alphas_cumprod(SCHEDULE.settings("DDIMScheduler", **betas))


@pytest.mark.parametrize("base", BASES)
def test_a_config_is_read_as_it_is(base: str) -> None:
    schedule = Schedule.from_config(BASES[base])
    assert schedule.scheduler == BASES[base]["_class_name"]
    assert schedule.prediction == BASES[base].get("prediction_type", "epsilon")
    assert schedule.config == BASES[base]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", DEFAULTS)
def test_settings_are_those_of_diffusers_from_config(name: str, base: str) -> None:
    """A scheduler made from another's config takes the keys that it has too, and its own defaults for the others."""
    skip = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    theirs = getattr(diffusers, name).from_config(BASES[base], **skip).config
    for key, value in Schedule.from_config(BASES[base]).settings(name, **skip).items():
        assert value == theirs.get(key), key


@pytest.mark.parametrize("name", ["DDPMSchedular", "FlowMatchEulerDiscreteScheduler", "", None, 3])
def test_an_unknown_class_is_refused(name: Any) -> None:
    with pytest.raises(ScheduleError, match=r"scheduler class is .*_class_name: one of DDPMScheduler"):
        Schedule.from_config({**SD15, "_class_name": name})
    assert class_of(SD15) == "PNDMScheduler"


def test_a_misspelt_class_is_told_its_neighbour() -> None:
    with pytest.raises(ScheduleError, match="did you mean DDIMScheduler"):
        Schedule.from_config({**SD15, "_class_name": "DDIMSchedular"})
    with pytest.raises(ScheduleError, match="scheduler class is None"):
        Schedule.from_config({})


def test_unknown_keys_are_ignored_and_known() -> None:
    schedule = Schedule.from_config({**SD15, "timestep_spacin": "trailing", "zzz": 1, "_private": 2})
    assert schedule.unknown_keys == ("timestep_spacin", "zzz")
    assert schedule.settings("DDIMScheduler") == Schedule.from_config(SD15).settings("DDIMScheduler")


def test_keys_of_other_classes_and_private_keys_are_ignored() -> None:
    config = dict.fromkeys(KNOWN_KEYS - DEFAULTS["DDIMScheduler"].keys(), "whatever")
    assert Schedule.from_config({**EMOJI, **config, "_private": 1}).settings("DDIMScheduler") == {
        **DEFAULTS["DDIMScheduler"],
        **{key: value for key, value in EMOJI.items() if not key.startswith("_")},
    }


@pytest.mark.parametrize(
    ("scheduler", "key"),
    [
        (scheduler, key)
        for scheduler, defaults in DEFAULTS.items()
        for key in {**_CHOICES, **_PER_CLASS.get(scheduler, {}), **_REFUSED}
        if key in defaults
    ],
)
def test_values_that_cannot_be_served_are_refused_by_name(scheduler: str, key: str) -> None:
    with pytest.raises(ScheduleError, match=rf"{scheduler} has {key} = 'nonsense'.* To fix it: set {key} to"):
        SCHEDULE.settings(scheduler, **{key: "nonsense"})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prediction_type", "v-prediction"),
        ("timestep_spacing", "karras"),
        ("beta_schedule", "sigmoid"),
        ("num_train_timesteps", 0),
        ("num_train_timesteps", 10.0),
        ("num_train_timesteps", True),
    ],
)
def test_a_config_that_cannot_be_served_is_refused_when_it_is_read(key: str, value: Any) -> None:
    with pytest.raises(ScheduleError, match=key):
        Schedule.from_config({**EMOJI, key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("beta_start", value) for value in ("x", None, True, float("nan"), [0.1], 10**400)),
        *(("sigma_min", value) for value in ("x", 0.0, -1.0, float("inf"))),
        ("sigma_max", 0),
        *(("use_karras_sigmas", value) for value in ("yes", 1, [])),
        *(("trained_betas", value) for value in ([[0.1]], "0.1", 0.1, [], ["x"])),
        *(("steps_offset", value) for value in (1.5, "1", -1, True)),
        ("num_train_timesteps", 10**9),
        ("_class_name", []),
    ],
)
def test_a_value_of_another_kind_is_refused_by_name(key: str, value: Any) -> None:
    config = {**SD15, "_class_name": "EulerDiscreteScheduler", key: value}
    with pytest.raises(ScheduleError, match="class" if key == "_class_name" else key):
        Schedule.from_config(config)


@pytest.mark.parametrize("scheduler", DEFAULTS)
def test_every_setting_has_a_kind(scheduler: str) -> None:
    for key in DEFAULTS[scheduler]:
        with pytest.raises(ScheduleError, match=key):
            SCHEDULE.settings(scheduler, **{"skip_prk_steps": True, key: {}})


def test_sigma_bounds_must_be_in_order() -> None:
    assert SCHEDULE.settings("EulerDiscreteScheduler", sigma_min=0.1, sigma_max=10)["sigma_max"] == 10
    for low, high in ((100, 1), (1, 1)):
        with pytest.raises(ScheduleError, match="0 < sigma_min < sigma_max"):
            SCHEDULE.settings("EulerDiscreteScheduler", sigma_min=low, sigma_max=high)


def test_a_root_of_a_negative_beta_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"the betas run from -0\.1"):
        SCHEDULE.settings("DDIMScheduler", beta_start=-0.1, beta_schedule="scaled_linear")


def test_null_flags_are_false_and_whole_numbers_are_numbers() -> None:
    flags = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "rescale_betas_zero_snr")
    config = {**SD15, **dict.fromkeys(flags), "sigma_min": None, "clip_sample_range": 1, "sample_max_value": 1}
    for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
        chosen = Schedule.from_config(config).settings(name)
        assert not any(chosen.get(flag) for flag in flags)
        assert None not in [chosen.get(flag, False) for flag in flags]


def test_pndm_must_skip_its_warm_up() -> None:
    """Its betas serve other solvers, and the solver "pndm", whose name says that it does."""
    schedule = Schedule.from_config({key: value for key, value in SD15.items() if key != "skip_prk_steps"})
    with pytest.raises(NotServedError, match=r"skip_prk_steps = False.*six memory slots.*set skip_prk_steps to True"):
        tabulate(None, schedule, 5)
    assert "six memory slots" in schedule.not_served()
    assert len(tabulate("pndm", schedule, 5)) == len(tabulate("euler", schedule, 5)) + 1


def test_points() -> None:
    point = Point(10.0, 0.6, 0.8)
    assert point.c_in == pytest.approx(1.0)
    assert point.lam == pytest.approx(math.log(0.6 / 0.8))
    assert Point(0.0, 1.0, 3.0).c_in == pytest.approx(1 / math.sqrt(10))
    assert CLEAN.lam == math.inf
    assert Point(0.0, 0.0, 1.0).lam == -math.inf


def test_levels_outside_of_training_are_refused() -> None:
    levels = Levels.of(SCHEDULE, SCHEDULE.settings("DDIMScheduler"), avoid_zero=False)
    assert levels.at(999).timestep == 999
    for timestep in (-1, 1000):
        with pytest.raises(RequestError, match=f"reaches timestep {timestep}"):
            levels.at(timestep)


@given(
    st.sampled_from(sorted(SOLVERS)),
    st.integers(1, 50),
    st.sampled_from(["leading", "trailing", "linspace"]),
    st.booleans(),
)
@settings(deadline=None, max_examples=200)
def test_grids_go_down(name: str, steps: int, spacing: str, karras: bool) -> None:
    """As many steps as asked for, each from more noise to less, each but DDIM's to where the next one begins."""
    options = {"use_karras_sigmas": True} if karras and "use_karras_sigmas" in DEFAULTS[SOLVERS[name].scheduler] else {}
    grid = grid_of(name, steps, timestep_spacing=spacing, **options)
    twice = name == "pndm" and steps > 1
    assert len(grid.points) == len(grid.targets) == steps + twice
    for here, there in grid.steps:
        assert there.sigma / there.alpha < here.sigma / here.alpha or here.timestep == 0
    if name not in ("ddim", "pndm"):
        assert grid.points[1:] == grid.targets[:-1]
    assert grid.start > 0


@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [751, 501, 251, 1]),  # a steps_offset of 1
        ("trailing", [999, 749, 499, 249]),
        ("linspace", [999, 666, 333, 0]),
    ],
)
def test_spacings(spacing: str, timesteps: list[int]) -> None:
    """Table 2 of Lin et al. 2023."""
    assert [point.timestep for point in grid_of("ddim", 4, timestep_spacing=spacing).points] == timesteps


def test_first_latents_scale() -> None:
    largest = grid_of("euler", 10, SDXL).points[0].sigma
    assert grid_of("euler", 10, SDXL).start == pytest.approx(math.hypot(largest, 1))
    assert grid_of("euler", 10, SDXL, timestep_spacing="trailing").start == pytest.approx(14.6146, abs=1e-4)
    assert grid_of("ddim", 10).start == grid_of("dpmpp-2m", 10).start == 1.0


def test_karras_sigmas() -> None:
    """Karras et al. 2022, equation 5, between the schedule's own first and last sigma."""
    sigmas = [point.sigma for point in grid_of("euler", 5, use_karras_sigmas=True, timestep_spacing="linspace").points]
    ramp = np.linspace(14.61464 ** (1 / 7), 0.029168 ** (1 / 7), 5)
    np.testing.assert_allclose(sigmas, ramp**7, rtol=1e-4)


def test_lambda_min_clipped_leaves_the_noisiest_timesteps_out() -> None:
    whole = grid_of("dpmpp-2m", 10, beta_schedule="squaredcos_cap_v2")
    clipped = grid_of("dpmpp-2m", 10, beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    assert whole.points[0].lam < -5.1 <= clipped.points[0].lam


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(deadline=None)
def test_beta_quantiles(probabilities: list[float]) -> None:
    ours = _beta_quantile(np.array(probabilities))
    np.testing.assert_allclose(ours, scipy.stats.beta.ppf(probabilities, 0.6, 0.6), atol=1e-12)


def test_at_most_as_many_timesteps_as_there_are() -> None:
    assert len(grid_of("euler", 1000).points) == 1000
    with pytest.raises(RequestError, match="1001 steps"):
        grid_of("euler", 1001)
    with pytest.raises(RequestError, match="reaches timestep 1000"):
        grid_of("ddim", 1000)  # "leading" with a steps_offset of 1
