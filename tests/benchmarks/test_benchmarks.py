"""The benchmarks run, and their report states what the samples show. No figure has a bound here."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.cases import QUICK
from benchmarks.measures import OURS, THEIRS, Measure, Result, Spread, at_least, at_most
from benchmarks.timing import paired

ROOT = Path(__file__).parents[2]
positive = st.floats(0.01, 100)


@given(pairs=st.lists(st.tuples(positive, positive), min_size=1, max_size=9))
def test_ratios_are_taken_round_by_round(pairs: list[tuple[float, float]]) -> None:
    ours, theirs = zip(*pairs, strict=True)
    less = Measure("time", "s", {OURS: ours, THEIRS: theirs})
    more = Measure("rate", "images/s", {OURS: ours, THEIRS: theirs}, better="more")
    assert less.ratio() == Spread.of([b / a for a, b in pairs])
    assert more.ratio() == Spread.of([a / b for a, b in pairs])
    assert less.ratio().low <= less.ratio().median <= less.ratio().high


def test_goals_compare_medians() -> None:
    measure = Measure("time", "s", {OURS: [1.0, 2.0, 9.0], THEIRS: [4.0, 10.0, 9.0]})
    assert at_least("4 times", measure, 4.0).reached
    assert not at_least("5 times", measure, 5.0).reached
    assert at_most("under 3 s", measure, 3.0).reached
    assert not at_most("under 2 s", measure, 2.0).reached


def test_sides_take_turns() -> None:
    order: list[tuple[str, int]] = []
    runs = paired({side: lambda i, side=side: order.append((side, i)) for side in (OURS, THEIRS)}, 2, 1)
    assert [len(samples) for samples in runs.values()] == [2, 2]
    assert {frozenset(side for side, _ in order[i : i + 2]) for i in (0, 2, 4)} == {frozenset((OURS, THEIRS))}


IN_CI = ("shared_batch",)
EVERY = [pytest.param(name, marks=() if name in IN_CI else pytest.mark.slow) for name in command.QUESTIONS]


@pytest.mark.parametrize("name", EVERY)
def test_every_question_is_answered(name: str, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks", name, "report", "--quick", "--results", str(tmp_path)]
    subprocess.run(arguments, cwd=ROOT, check=True, capture_output=True)
    part = json.loads((tmp_path / "cpu.json").read_text())[name]
    result = Result.from_dict(part)
    assert all(sample > 0 for measure in result.measures for samples in measure.samples.values() for sample in samples)
    goals = import_module(f"benchmarks.cpu.{name}").goals(result)
    assert all("nan" not in goal.measured for goal in goals)
    assert str(tmp_path) not in json.dumps(part)
    page = (tmp_path / "README.md").read_text()
    assert all(goal.text in page for goal in goals)
    assert (tmp_path / f"{name.replace('_', '-')}.png").stat().st_size > 1000


def test_a_missed_goal_is_said_and_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    part: dict[str, Any] = {
        "date": "2026-01-01",
        "config": QUICK.to_dict(),
        "machine": {"load_before": 0.0},
        "measures": [{"name": "one image", "unit": "s", "samples": {OURS: [2.0], THEIRS: [3.0]}, "better": "less"}],
        "facts": {"psnr_db": 90.0},
    }
    goals = [at_least("2 times", Result.from_dict(part)["one image"], 2)]
    monkeypatch.setattr("benchmarks.cpu.one_image.goals", lambda result: goals)
    section = report._section(report.Answer("one_image", part, "This was tried."))
    assert "Not reached: 2 times." in section
    assert "This was tried." in section
    assert "**1.5×**" in section
