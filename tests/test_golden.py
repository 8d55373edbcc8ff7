"""Golden runs: repeated as they were recorded, and never within bounds by accident."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from latentrt import Engine
from latentrt.bundle.bundle import Bundle, embedded
from latentrt.bundle.golden import Golden
from latentrt.golden import TOLERANCE, measure, worst_error


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(check_hashes=False) as engine:
        yield engine


def with_runs(engine: Engine, *runs: Golden) -> Engine:
    spec = replace(engine.spec, golden=runs)
    return Engine(Bundle(engine.bundle.root, spec, {}), engine.backend)


@pytest.mark.parametrize("name", embedded())
def test_embedded_models_draw_what_they_drew_when_exported(name: str) -> None:
    with Engine.load(name) as engine:
        assert worst_error(engine) < TOLERANCE
        assert {run.prompt for run in engine.spec.golden} == ({""} if name == "pixels" else {"a red apple", "a"})


def test_runs_of_this_machine_are_repeated_to_the_bit(engine: Engine) -> None:
    assert worst_error(with_runs(engine, *measure(engine))) == 0


def test_a_run_is_repeated_with_the_solver_it_names(engine: Engine) -> None:
    run = measure(engine)[0]
    other = "euler" if run.solver != "euler" else "ddim"
    assert worst_error(with_runs(engine, replace(run, solver=other))) > 1e-3


@pytest.mark.parametrize("change", [{"std": math.nan}, {"mean": math.nan}, {"first": (0.0, math.nan, 0.0)}])
def test_nan_in_any_place_is_seen(engine: Engine, change: dict[str, Any]) -> None:
    good, bad = measure(engine)
    first = change.get("first", bad.first)
    bad = replace(bad, **{**change, "first": (first * 8)[: len(bad.first)]})
    assert math.isnan(worst_error(with_runs(engine, good, bad)))
    assert math.isnan(worst_error(with_runs(engine)))
