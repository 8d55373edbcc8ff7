"""Tracing: how a new solver is written, and which functions are no solvers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from latentrt.errors import ScheduleError, TraceError
from latentrt.sampling.schedule import Point, Schedule
from latentrt.sampling.solvers import SOLVERS, Solver
from latentrt.sampling.spacing import CLEAN, Grid, sigma_grid
from latentrt.sampling.table import Table, tabulate
from tests.support.sampling.scheduler_configs import SD15

SCHEDULE = Schedule.from_config(SD15)


def table_of(name: str, steps: int = 8) -> Table:
    return tabulate(name, SCHEDULE, steps)


def solver_of(monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any]) -> None:
    monkeypatch.setitem(SOLVERS, "broken", Solver(function, "EulerDiscreteScheduler", sigma_grid))


def test_a_new_solver_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def midpoint(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        for here, there in grid.steps:
            middle = grid.levels.exploding((here.sigma + there.sigma) / 2)
            guess = x + (middle.sigma - here.sigma) * model.epsilon(x, here)
            x = x + (there.sigma - here.sigma) * model.epsilon(guess, middle)
        return x

    solver_of(monkeypatch, midpoint)
    assert len(table_of("broken", 5)) == 10


def test_a_row_holds_one_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        return model.x0(x, grid.points[0]) + noise() + 2 * noise()

    solver_of(monkeypatch, twice)
    with pytest.raises(TraceError, match="row 0 needs two noises"):
        table_of("broken")


def test_noise_cannot_be_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        kept = noise()
        for here in grid.points:
            x = model.x0(x, here) + kept
        return x

    solver_of(monkeypatch, late)
    with pytest.raises(TraceError, match="row 1 needs two noises or an earlier one"):
        table_of("broken")


def test_history_is_four_memories_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def long(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        kept: list[Any] = []
        for here in grid.points:
            kept = [model.x0(x, here), *kept[:4]]
            x = x + sum(kept)
        return x

    solver_of(monkeypatch, long)
    with pytest.raises(TraceError, match="row 4 needs more than 4 memories"):
        table_of("broken")


def test_an_earlier_x_needs_steps_that_can_be_inverted(monkeypatch: pytest.MonkeyPatch) -> None:
    def jump(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        first = x
        for here in grid.points:
            x = model.x0(x, here)
        return x + first

    solver_of(monkeypatch, jump)
    with pytest.raises(TraceError, match="kept nothing of them"):
        table_of("broken")


def test_the_network_must_be_called(monkeypatch: pytest.MonkeyPatch) -> None:
    solver_of(monkeypatch, lambda x, grid, model, noise: x)
    with pytest.raises(TraceError, match="never called the network"):
        table_of("broken")


def test_solvers_cannot_multiply_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    solver_of(monkeypatch, lambda x, grid, model, noise: model.x0(x, grid.points[0]) * x)
    with pytest.raises(TypeError):
        table_of("broken")


def test_an_unknown_output_of_an_earlier_row_is_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def raw(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        _, epsilon = model.x0_epsilon(x, grid.points[0])
        return model.x0(x, grid.points[1]) + epsilon

    solver_of(monkeypatch, raw)
    with pytest.raises(TraceError, match="row 1 uses out of row 0"):
        table_of("broken")


def test_coefficients_are_finite_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def divide(x: Any, grid: Grid, model: Any, noise: Any) -> Any:
        return model.x0(x, CLEAN) / CLEAN.sigma

    solver_of(monkeypatch, divide)
    with pytest.raises(ScheduleError, match="no finite coefficients"):
        table_of("broken")
    solver_of(monkeypatch, lambda x, grid, model, noise: model.x0(x, Point(0.0, 1.0, 1.0)) * float("inf"))
    with pytest.raises(ScheduleError, match="no finite coefficients"):
        table_of("broken")
