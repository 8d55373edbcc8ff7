"""Turns by cost: nobody waits for more than one dear turn, and each kind gets the same."""

from __future__ import annotations

from latentrt.serve.core.rules.turns import Turns


def run(turns: Turns[str], costs: dict[str, float], count: int) -> list[str]:
    chosen = []
    for _ in range(count):
        kind = turns.first(costs)
        turns.take(kind, costs)
        chosen.append(kind)
    return chosen


def test_kinds_spend_the_same_in_turns_of_different_cost() -> None:
    chosen = run(Turns(), {"large": 100.0, "small": 1.0}, 1010)
    assert chosen.count("large") == 10
    assert chosen[:99] == ["small"] * 99


def test_who_comes_waits_for_no_second_dear_turn_and_has_no_claim_to_the_past() -> None:
    turns = Turns[str]()
    run(turns, {"large": 100.0}, 50)
    for _ in range(3):  # comes and goes: what it spent before is not forgotten, so the other one is not starved
        assert run(turns, {"large": 100.0, "small": 1.0}, 30) == ["small"] * 30
        turns.first({"large": 100.0})
    assert "large" in run(turns, {"large": 100.0, "small": 1.0}, 12)
    run(turns, {"large": 100.0}, 50)
    assert run(turns, {"large": 100.0, "small": 1.0}, 202).count("large") == 2
