"""Ticks of clients with few pictures and with many."""

from __future__ import annotations

from collections import Counter

import pytest

from latentrt.serve.core.handle import Handle, Slot
from latentrt.serve.core.rules.movers import Movers
from latentrt.serve.core.rules.terms import Terms
from tests.support.serve.fake_engine import handle_of


def running(owner: str, count: int, *, terms: Terms = Terms(), guidance: float = 3.0) -> list[Slot]:  # noqa: B008
    handle: Handle = handle_of(count=count, guidance=guidance)
    handle.owner, handle.terms = owner, terms
    return [Slot(handle, index, 0.0) for index in range(count)]


def moved(slots: list[Slot], ticks: int, waiting: Counter[str] | None = None) -> Counter[str]:
    """How often each client's pictures moved."""
    movers, wanted = Movers(), Counter[str]()
    for slot in slots:
        wanted[slot.handle.owner] += slot.handle.lanes
    wanted += waiting or {}
    return Counter(slot.handle.owner for _ in range(ticks) for slot in movers.of(slots, wanted))


def test_others_have_as_many_lanes_as_the_one_that_has_the_fewest() -> None:
    greedy = [slot for name in ("a", "b", "c") for slot in running(name, 3)]
    assert moved([*greedy, *running("modest", 1)], 12) == {"modest": 12, "a": 4, "b": 4, "c": 4}


def test_equal_clients_all_move() -> None:
    slots = [*running("a", 2), *running("b", 2)]
    assert moved(slots, 3) == {"a": 6, "b": 6}
    assert moved(running("a", 5), 2) == {"a": 10}
    assert moved(slots, 4, Counter(a=2)) == {"a": 8, "b": 8}
    assert moved([*running("a", 1), *running("c", 1), *slots[2:]], 4, Counter(a=8, c=8)) == {"b": 8, "a": 4, "c": 4}


def test_a_picture_of_two_lanes_moves_beside_one_of_one() -> None:
    assert moved([*running("a", 4), *running("b", 1, guidance=1.0)], 5) == {"a": 5, "b": 5}


@pytest.mark.parametrize(
    ("terms", "others", "expected"),
    [
        (Terms(), 1, {"a": 3, "b": 3}),
        (Terms(share=3), 1, {"a": 9, "b": 3}),  # as much for its share as the other one
        (Terms(priority=1), 1, {"a": 9, "b": 3}),
        (Terms(priority=1), 6, {"a": 9, "b": 9}),
        (Terms(priority=-1), 1, {"a": 3, "b": 3}),
    ],
)
def test_shares_and_priorities_count(terms: Terms, others: int, expected: dict[str, int]) -> None:
    assert moved([*running("a", 3, terms=terms), *running("b", others)], 3) == expected
