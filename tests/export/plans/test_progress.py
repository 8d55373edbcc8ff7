"""The progress of a build, by nested phases. tests/export/plans/test_to_tensorrt.py runs whole builds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt_export.plans.progress import Phases


def test_phases_within_phases() -> None:
    phases = Phases()
    phases.start("engine", None, 2)
    phases.start("tactics", "engine", 4)
    phases.step("tactics")
    assert phases.share == pytest.approx(1 / 8)
    phases.start("inner", "tactics", 2)
    phases.step("inner")
    assert phases.share == pytest.approx((1 + 1 / 2) / 8)
    phases.finish("tactics")  # ends the inner one too
    assert phases.share == pytest.approx((1 + 1 / 2) / 8)
    phases.step("engine")
    phases.step("unheard of")
    assert phases.share == pytest.approx(1 / 2)
    phases.finish("unheard of")


@given(st.lists(st.tuples(st.sampled_from(["start", "step", "finish"]), st.sampled_from("abc"), st.integers(0, 4))))
def test_the_share_never_falls_and_stays_within_one(events: list[tuple[str, str, int]]) -> None:
    phases, last = Phases(), 0.0
    for what, name, steps in events:
        if what == "start":
            phases.start(name, None, steps)
        else:
            getattr(phases, what)(name)
        assert last <= phases.share <= 1
        last = phases.share
