"""The queue's rules by themselves: who is next, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.serve.core.queue import Part, Queue, begins, sooner

SHAPES = ((4, 8, 8), (4, 16, 16))


def part(due: float = 0.0, lanes: int = 2, shape: Any = SHAPES[0], *, prepared: bool = True) -> Part:
    job: Any = SimpleNamespace(row=0) if prepared else None
    ticket: Any = object()
    return Part(ticket, 0, shape, lanes, 4, 0.0, due, 100.0, job=job)


def test_equal_due_times_keep_the_order_of_arrival() -> None:
    queue = Queue(9)
    late, first, second, early = part(2.0), part(1.0), part(1.0), part(0.5)
    for one in (late, first, second, early):
        queue.add([one])
    assert queue.waiting == [early, first, second, late]
    queue.discard(first)
    queue.discard(first)
    assert queue.next(4, {}, lambda shape: 4) == [early, second]
    assert (queue.free, len(queue.unprepared(9, 9))) == (6, 0)


def test_orders_that_have_no_jobs_yet_are_passed_and_prepared_in_order() -> None:
    queue = Queue(9)
    raw, ready = part(1.0, prepared=False), part(2.0)
    queue.add([raw, ready])
    assert queue.next(4, {}, lambda shape: 4) == [ready]
    assert queue.unprepared(1, 2) == [raw.ticket]


def test_no_more_is_prepared_than_can_have_lanes_soon() -> None:
    queue = Queue(9)
    first, *others = (part(float(due), prepared=False) for due in range(4))
    small = part(9.0, shape=SHAPES[1], prepared=False)
    queue.add([first, *others, small])
    assert queue.unprepared(9, 2) == [first.ticket, others[0].ticket, small.ticket]
    assert queue.unprepared(1, 2) == [first.ticket]
    first.job = others[0].job = SimpleNamespace(row=0)  # type: ignore[assignment]
    assert queue.unprepared(9, 2) == [small.ticket]


def test_a_shape_at_its_cap_is_passed_by_others_and_not_by_its_own() -> None:
    queue = Queue(9)
    wide, narrow, other = part(1.0, 2), part(2.0, 1), part(3.0, 2, SHAPES[1])
    queue.add([wide, narrow, other])
    assert queue.next(8, {SHAPES[0]: 3}, lambda shape: 4) == [other]
    assert queue.next(4, {SHAPES[0]: 3}, lambda shape: 8) == []
    assert queue.next(8, {}, lambda shape: 1) == [wide, other]  # one of a shape may always run


arrivals = st.tuples(st.integers(0, 40), st.integers(1, 2), st.integers(0, 1), st.integers(1, 6), st.integers(0, 60))


@settings(max_examples=200, deadline=None)
@given(plan=st.lists(arrivals, min_size=1, max_size=30), lanes=st.integers(2, 6), cap=st.integers(2, 6))
def test_everybody_is_served_and_nobody_is_passed_for_ever(
    plan: list[tuple[int, int, int, int, int]], lanes: int, cap: int
) -> None:
    """A tick is a second here, and patience ten. Once somebody's patience is over, later arrivals come behind, but for
    those of a shape of their own that take lanes which the waiting shape may not have.
    """
    queue, running, served = Queue(99), dict[Part, int](), dict[Part, int]()
    pending = sorted(plan)
    arrived: dict[Part, int] = {}
    tick = 0
    while pending or queue.waiting or running:
        while pending and pending[0][0] <= tick:
            _, width, shape, rows, urgency = pending.pop(0)
            one = part(sooner(tick + 10.0, tick + urgency), width, SHAPES[shape])
            one.rows = rows
            arrived[one] = tick
            queue.add([one])
        busy = {shape: sum(one.lanes for one in running if one.shape == shape) for shape in SHAPES}
        busy = {shape: count for shape, count in busy.items() if count}
        for one in queue.next(lanes, busy, lambda shape: cap):
            queue.discard(one)
            running[one] = one.rows
            served[one] = tick
        assert sum(one.lanes for one in running) <= lanes
        assert running or not queue.waiting
        running = {one: left - 1 for one, left in running.items() if left > 1}
        tick += 1
    for one, other in ((a, b) for a in served for b in served if a.shape == b.shape):
        assert not (arrived[other] > arrived[one] + 10 and served[other] < served[one])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), max_size=6), st.lists(st.integers(1, 9), max_size=9), st.integers(1, 4))
def test_begins_is_what_ticking_shows(running: list[int], waiting: list[int], seats: int) -> None:
    """Against a run of ticks: who has a seat keeps it, the next one takes the first that is free."""
    expected, seated, queue, tick = [], list(running), list(waiting), 0
    while queue:
        while queue and len(seated) < seats:
            expected.append(tick)
            seated.append(queue.pop(0))
        seated = [left - 1 for left in seated if left > 1]
        tick += 1
    assert begins(running, waiting, seats) == expected
