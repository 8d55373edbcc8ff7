"""Which models are dropped so that another has room."""

from __future__ import annotations

import pytest

from latentrt.serve.core.rules.room import Resident, to_drop

OLD, NEW = Resident("old", 40, 1.0, busy=False), Resident("new", 30, 2.0, busy=False)
BUSY = Resident("busy", 30, 0.0, busy=True)


@pytest.mark.parametrize(
    ("residents", "needed", "room", "expected"),
    [
        ([], 50, 100, []),
        ([NEW, OLD], 30, 100, []),
        ([NEW, OLD], 31, 100, ["old"]),
        ([NEW, OLD], 80, 100, ["old", "new"]),
        ([NEW, OLD, BUSY], 40, 100, ["old"]),
        ([NEW, OLD, BUSY], 80, 100, None),  # others must end first, and none is dropped in vain
        ([NEW, OLD], 200, 100, ["old", "new"]),  # larger than thought: alone
        ([BUSY], 200, 100, None),
        ([NEW, OLD, BUSY], 10**9, None, []),
    ],
)
def test_the_least_recently_used_go_first(
    residents: list[Resident], needed: int, room: int | None, expected: list[str] | None
) -> None:
    assert to_drop(residents, needed, room) == expected
