"""The queue's rules by themselves: which pictures are next, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.serve.core.handle import Slot, Stage
from latentrt.serve.core.queue import begins, next_to_prepare, next_to_run

SHAPES = ((4, 8, 8), (4, 16, 16))


def slot(
    lanes: int = 2, shape: Any = SHAPES[0], *, prepared: bool = True, submitted: bool = True, running: bool = False
) -> Slot:
    job: Any = SimpleNamespace(moved=0) if prepared else None
    handle: Any = SimpleNamespace(shape=shape, lanes=lanes, rows=4, due=0.0, submitted=submitted, owner="a")
    return Slot(handle, 0, 100.0, Stage.RUNNING if running else Stage.WAITING, job)


def test_requests_that_have_no_jobs_yet_are_passed_and_prepared_in_order() -> None:
    waiting = [slot(prepared=False, submitted=False), slot(prepared=False), slot()]
    assert next_to_run(waiting, 4, lambda shape: 4) == waiting[2:]
    assert next_to_prepare(waiting, 9, {"a"}) is waiting[1].handle


def test_no_more_is_prepared_than_can_have_lanes_soon() -> None:
    first, second, third = (slot(prepared=False) for _ in range(3))
    small = slot(shape=SHAPES[1], prepared=False)
    waiting = [first, second, third, small]
    for prepared, expected in ((first, second), (second, small)):
        prepared.job = SimpleNamespace(moved=0)  # type: ignore[assignment]
        assert next_to_prepare(waiting, 2, {"a"}) is expected.handle
    small.job = SimpleNamespace(moved=0)  # type: ignore[assignment]
    assert next_to_prepare(waiting, 2, {"a"}) is None
    assert next_to_prepare(waiting[1:], 2, {"a"}) is third.handle
    assert next_to_prepare(waiting, 2, {"b"}) is third.handle  # its client has nothing prepared


def test_a_shape_at_its_cap_is_passed_by_others_and_not_by_its_own() -> None:
    wide, narrow, other = slot(2), slot(1), slot(2, SHAPES[1])
    waiting = [wide, narrow, other]
    busy = slot(3, running=True)
    assert next_to_run([busy, *waiting], 8, lambda shape: 4) == [other]
    assert next_to_run([busy, *waiting], 4, lambda shape: 8) == []
    assert next_to_run(waiting, 8, lambda shape: 1) == [wide, other]  # one of a shape may always run


arrivals = st.tuples(st.integers(0, 40), st.integers(1, 2), st.integers(0, 1), st.integers(1, 6), st.integers(0, 60))


@settings(max_examples=200, deadline=None)
@given(plan=st.lists(arrivals, min_size=1, max_size=30), lanes=st.integers(2, 6), cap=st.integers(2, 6))
def test_every_picture_is_served_and_none_is_passed_without_end(
    plan: list[tuple[int, int, int, int, int]], lanes: int, cap: int
) -> None:
    """A tick is a second here, and patience ten. Once a picture's patience is over, later arrivals come behind, but for
    those of a shape of their own that take lanes which the waiting shape may not have.
    """
    waiting, running, served = list[Slot](), dict[Slot, int](), dict[Slot, int]()
    pending = sorted(plan)
    arrived: dict[Slot, int] = {}
    tick = 0
    while pending or waiting or running:
        while pending and pending[0][0] <= tick:
            _, width, shape, rows, urgency = pending.pop(0)
            one = slot(width, SHAPES[shape])
            one.handle.rows, one.handle.due = rows, min(tick + 10.0, tick + urgency)
            arrived[one] = tick
            waiting = sorted([*waiting, one], key=lambda one: one.handle.due)
        for one in next_to_run([*running, *waiting], lanes, lambda shape: cap):
            waiting.remove(one)
            one.stage = Stage.RUNNING
            running[one] = one.handle.rows
            served[one] = tick
        assert sum(one.handle.lanes for one in running) <= lanes
        assert running or not waiting
        running = {one: left - 1 for one, left in running.items() if left > 1}
        tick += 1
    for one, other in ((a, b) for a in served for b in served if a.handle.shape == b.handle.shape):
        assert not (arrived[other] > arrived[one] + 10 and served[other] < served[one])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(1, 9), max_size=9), st.integers(1, 4))
def test_begins_is_what_ticking_shows(running: list[int], waiting: list[int], seats: int) -> None:
    """Against a run of ticks: a picture with a seat keeps it, the next one takes the first that is free."""
    expected, seated, queue, tick = [], list(running), list(waiting), 0
    while queue:
        while queue and len(seated) < seats:
            expected.append(tick)
            seated.append(queue.pop(0))
        seated = [left - 1 for left in seated if left > 1]
        tick += 1
    assert begins(running, waiting, seats) == expected
