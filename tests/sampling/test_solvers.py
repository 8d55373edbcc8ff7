"""The solver functions, run on arrays: against k-diffusion, exact solutions, and the tables made of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.errors import ScheduleError
from latentrt.sampling.schedule import Point, Schedule
from latentrt.sampling.solvers import SOLVERS, Solver
from latentrt.sampling.spacing import Grid, Levels
from latentrt.sampling.table import Table, advance, tabulate
from latentrt.sampling.trace import epsilon_from, x0_from
from tests.support.sampling.kdiffusion_golden import GOLDEN, SIGMAS, START, denoise, noises
from tests.support.sampling.scheduler_configs import SD15

Float64 = NDArray[np.float64]
SCHEDULE = Schedule.from_config(SD15)
PRESERVING = {"dpmpp-2m", "dpmpp-3m", "dpmpp-2m-sde", "dpmpp-3m-sde", "dpmpp-3m-sde-kdiffusion", "unipc", "unipc-3"}


class Denoiser:
    """The model of a solver, on arrays: x0 is a function of x0 + sigma / alpha * epsilon and of sigma / alpha."""

    def __init__(self, function: Callable[[Float64, float], Float64]) -> None:
        self.function = function

    def x0(self, x: Float64, here: Point) -> Float64:
        return self.function(x / here.alpha, here.sigma / here.alpha)

    def epsilon(self, x: Float64, here: Point) -> Float64:
        return (x - here.alpha * self.x0(x, here)) / here.sigma

    output = epsilon

    def x0_epsilon(self, x: Float64, here: Point) -> tuple[Float64, Float64]:
        return self.x0(x, here), self.epsilon(x, here)


@dataclass
class Network:
    """The model of a solver, on arrays: a network that predicts what the schedule says, clipped where it clips."""

    prediction: str
    clip: float
    network: Callable[[Float64, float], Float64]
    calls: list[tuple[float, Float64]] = field(default_factory=list)

    def output(self, x: Float64, here: Point) -> Float64:
        self.calls.append((here.timestep, here.c_in * x))
        return self.network(here.c_in * x, here.timestep)

    def x0(self, x: Float64, here: Point) -> Float64:
        return self.x0_epsilon(x, here)[0]

    def epsilon(self, x: Float64, here: Point) -> Float64:
        return (x - here.alpha * self.x0(x, here)) / here.sigma

    def x0_epsilon(self, x: Float64, here: Point) -> tuple[Float64, Float64]:
        out = self.output(x, here)
        (p, q), (r, s) = x0_from(self.prediction, here), epsilon_from(self.prediction, here)
        x0 = p * x + q * out
        return (np.clip(x0, -self.clip, self.clip) if self.clip else x0), r * x + s * out


def grid_of(name: str, sigmas: list[float], **options: Any) -> Grid:
    """Return a grid over any sigmas, with alpha as the solver needs it."""
    solver = SOLVERS[name]
    chosen = SCHEDULE.settings(solver.scheduler, **{**solver.settings, **options})
    levels = Levels.of(SCHEDULE, chosen, avoid_zero=True)
    alphas = [1 / math.hypot(sigma, 1) if name in PRESERVING else 1.0 for sigma in sigmas]
    points = [Point(0.0, alpha, sigma * alpha) for alpha, sigma in zip(alphas, sigmas, strict=True)]
    return Grid(tuple(points[:-1]), tuple(points[1:]), 1.0, levels, chosen)


def solve(name: str, grid: Grid, function: Callable[[Float64, float], Float64], start: Float64) -> Float64:
    """Return the last latents of a solver, from and to x0 + sigma * epsilon (alpha = 1)."""
    draws, solver = noises(), SOLVERS[name]
    x = start * grid.points[0].alpha
    last = solver.function(x, grid, Denoiser(function), lambda: next(draws)[: len(x)], **solver.arguments)
    return np.asarray(last / grid.targets[-1].alpha)


@pytest.mark.parametrize(("name", "golden"), json.loads(GOLDEN.read_text(encoding="utf-8")).items())
def test_k_diffusion_returns_the_same(name: str, golden: list[float]) -> None:
    """Its samplers, run on the same sigmas, denoiser and noise (see kdiffusion_golden.py)."""
    np.testing.assert_allclose(solve(name, grid_of(name, SIGMAS), denoise, START), golden, rtol=1e-12)


def test_third_order_sde_steps_of_diffusers_are_not_k_diffusions() -> None:
    """diffusers adds the half within phi_3 that k-diffusion and the expansion of the exponential subtract."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["dpmpp-3m-sde-kdiffusion"]
    options = {"solver_type": "heun", "lower_order_final": False}
    theirs = solve("dpmpp-3m-sde", grid_of("dpmpp-3m-sde", SIGMAS, **options), denoise, START)
    assert np.abs(theirs - golden).max() > 0.1


# Gaussian data: its score is known, and so is the path of each x.
MEAN, SPREAD = 1.5, 0.5


def gaussian(x: Float64, sigma: float) -> Float64:
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def carried(x: Float64, start: float, end: float) -> Float64:
    """Return the exact solution of dx/dsigma = epsilon from one sigma to another."""
    return MEAN + (x - MEAN) * math.sqrt((SPREAD**2 + end**2) / (SPREAD**2 + start**2))


def error(name: str, count: int, options: dict[str, Any]) -> float:
    """Return the distance from the exact solution after `count` steps from sigma = 3 to 1.

    The steps grow from very short ones, or the first steps, which are of first order, would decide.
    """
    grid = grid_of(name, (3.0 * (1 / 3) ** np.linspace(0, 1, count + 1) ** 3).tolist(), **options)
    start = np.array([5.0])
    return float(abs(solve(name, grid, gaussian, start) - carried(start, 3.0, 1.0))[0])


TO_NOISE = {"lower_order_final": False, "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("name", "options", "order"),
    [
        ("euler", {}, 1),
        ("heun", {}, 2),
        ("dpm2", {}, 2),
        ("lms", {}, 4),
        ("dpmpp-2m", {**TO_NOISE, "solver_order": 1}, 1),
        ("dpmpp-2m", TO_NOISE, 2),
        ("dpmpp-2m", {**TO_NOISE, "solver_type": "heun"}, 2),
        # Not 3: as in diffusers and k-diffusion, half a second difference stands where a second derivative should.
        ("dpmpp-3m", TO_NOISE, 2),
        ("unipc", {**TO_NOISE, "solver_order": 1}, 2),  # UniPC's corrector adds one order
        ("unipc", {**TO_NOISE, "solver_type": "bh1"}, 3),
        ("unipc", TO_NOISE, 3),
        ("unipc-3", TO_NOISE, 4),
    ],
)
def test_errors_fall_with_the_order(name: str, options: dict[str, Any], order: int) -> None:
    slope = math.log2(error(name, 80, options) / error(name, 160, options))
    assert order - 0.25 < slope < order + 0.6


@pytest.mark.parametrize("name", ["ddim", "pndm", "euler", "heun", "dpm2", "lms", "dpmpp-2m", "dpmpp-3m", "unipc"])
def test_many_steps_find_the_data(name: str) -> None:
    """From pure noise, by the project's own grids, to Gaussian data: the mean is exact, the spread nearly."""
    solver = SOLVERS[name]
    grid = solver.grid(SCHEDULE, SCHEDULE.settings(solver.scheduler, **solver.settings), 100)
    here, there = grid.points[0], grid.targets[-1]
    x = np.array([-1.0, 0.0, 1.0]) * grid.start
    found = solver.function(x, grid, Denoiser(gaussian), None, **solver.arguments) / there.alpha
    wanted = carried(x / here.alpha, here.sigma / here.alpha, there.sigma / there.alpha)
    np.testing.assert_allclose(found, wanted, atol=0.02)


def network(shown: Float64, timestep: float) -> Float64:
    return np.tanh(shown) * np.linspace(-1, 1, shown.size) + np.cos(timestep / 200 + np.arange(shown.size))


def table_run(table: Table, x: Float64, noise: Callable[[], Float64]) -> tuple[list[tuple[float, Float64]], Float64]:
    """Return the inputs of a table's network, and the last latents."""
    calls, memory = [], np.full((4, *x.shape), np.nan)
    for row in table.rows:
        calls.append((row.timestep, row.c_in * x))
        out = network(row.c_in * x, row.timestep)
        x = advance(row, x, out, memory, noise() if row.c else None)
    return calls, x


def drawing(count: int) -> Callable[[], Float64]:
    rng = np.random.default_rng(5)
    return lambda: rng.standard_normal(count)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_a_table_is_its_solver(data: st.DataObject) -> None:
    """Rows applied to arrays do what the solver function does on the same arrays: call for call, in float64.

    Of a whole run, or of one that begins midway.
    """
    name = data.draw(st.sampled_from(sorted(SOLVERS)))
    solver, options = SOLVERS[name], data.draw(st.sampled_from(choices(SOLVERS[name])))
    steps = data.draw(st.integers(1, 30))
    first = 0 if solver.only_whole else data.draw(st.integers(0, steps - 1))
    table = tabulate(name, SCHEDULE, steps, strength=min(1 - (first - 0.5) / steps, 1.0), **options)
    own = {key: options.get(key, value) for key, value in solver.arguments.items()}
    chosen = SCHEDULE.settings(
        solver.scheduler, **{**solver.settings, **{k: v for k, v in options.items() if k not in own}}
    )
    grid = solver.grid(SCHEDULE, chosen, steps).since(first)
    clip = chosen["clip_sample_range"] if chosen.get("clip_sample") else 0.0
    model = Network(chosen["prediction_type"], clip, network)
    x = np.linspace(-2, 2, 5) * table.start
    last = solver.function(x, grid, model, drawing(5), **own)
    calls, ours = table_run(table, x, drawing(5))
    assert [t for t, _ in calls] == [t for t, _ in model.calls]
    for (_, shown), (_, wanted) in zip(calls, model.calls, strict=True):
        np.testing.assert_allclose(shown, wanted, rtol=1e-10, atol=1e-10 * np.abs(wanted).max())
    np.testing.assert_allclose(ours, last, rtol=1e-10, atol=1e-10 * np.abs(last).max())


def choices(solver: Solver) -> list[dict[str, Any]]:
    """Return sets of options that a solver has and that change the arguments of its function."""
    known = SCHEDULE.settings(solver.scheduler)
    wanted: list[dict[str, Any]] = [
        *({"timestep_spacing": spacing} for spacing in ("leading", "trailing", "linspace")),
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"clip_sample": True, "clip_sample_range": 0.8},
        {"use_karras_sigmas": True},
        {"eta": 0.6},
        {"s_noise": 0.5},
        {"order": 2},
        {"solver_type": "heun"},
        {"disable_corrector": [1, 2]},
    ]
    fits = [options for options in wanted if all(key in known or key in solver.arguments for key in options)]
    return [{}, *(options for options in fits if allowed(solver, options))]


def allowed(solver: Solver, options: dict[str, Any]) -> bool:
    if options == {"prediction_type": "sample"}:
        return "KDPM2" not in solver.scheduler and solver.scheduler not in ("PNDMScheduler", ANCESTRAL)
    return options != {"solver_type": "heun"} or solver.scheduler == "DPMSolverMultistepScheduler"


ANCESTRAL = "EulerAncestralDiscreteScheduler"


ADDING = ("euler-ancestral", "dpm2-ancestral", "dpmpp-2s-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde-kdiffusion")


@pytest.mark.parametrize("name", ADDING)
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_a_step_that_goes_further_adds_as_much_noise(name: str, eta: float) -> None:
    """Where the denoiser finds 0 everywhere, x is noise alone, and stays of the level's deviation with any eta."""
    grid, solver = grid_of(name, [2.0, 1.0]), SOLVERS[name]

    def step(x: float, drawn: float) -> float:
        start, noise = np.array([x]) * grid.points[0].alpha, np.array([drawn])
        own = {**solver.arguments, "eta": eta}
        last = solver.function(start, grid, Denoiser(lambda x, sigma: 0 * x), lambda: noise, **own)
        return float(last[0] / grid.targets[-1].alpha)

    kept, added = step(1.0, 0.0), step(0.0, 1.0)
    assert math.hypot(kept * 2.0, added) == pytest.approx(1.0)
    assert (added == 0) is (eta == 0)


@pytest.mark.parametrize(
    ("name", "plain"),
    [("euler-ancestral", "euler"), ("dpmpp-2m-sde", "dpmpp-2m"), ("dpmpp-3m-sde-kdiffusion", "dpmpp-3m")],
)
def test_without_eta_a_solver_is_the_one_without_noise(name: str, plain: str) -> None:
    same = {"solver_type": "heun", "lower_order_final": False} if "3m" in name else {}
    ours = tabulate(name, SCHEDULE, 9, eta=0.0)
    np.testing.assert_allclose(ours.array, tabulate(plain, SCHEDULE, 9, **same).array, rtol=1e-9, atol=1e-12)
    half, whole = (np.array([row.c for row in tabulate(name, SCHEDULE, 9, s_noise=s).rows]) for s in (0.5, 1.0))
    np.testing.assert_allclose(half, whole / 2)
    assert whole.any()


@pytest.mark.parametrize("options", [{"s_noise": -1}, {"s_noise": "much"}, {"eta": 2}])
def test_eta_and_s_noise_have_a_range(options: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=f"euler-ancestral has {next(iter(options))}"):
        tabulate("euler-ancestral", SCHEDULE, 9, **options)
