"""The service under load: places, deadlines, timeouts and orders that are given up."""

from __future__ import annotations

import time

import pytest

from latentrt.errors import RequestError
from latentrt.serve.core.curve import Curve
from latentrt.serve.core.ticket import Cancelled, DeadlineUnreachable, Failed, QueueFull, QueueTimeout, RunTimeout
from tests.serve.conftest import Serve, eventually
from tests.support.serve.fake_engine import SHAPE, Fakes, events, order, submit, submit_and_cancel, wait


def test_places_are_counted_and_given_back(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=3)
    place = service.reserve(2, rows=4, deadline=None)
    with pytest.raises(QueueFull, match="1 of 3 places") as refused:
        service.reserve(2, rows=4, deadline=None)
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    place.release()
    place.release()
    with service.reserve(3, rows=4, deadline=None):
        assert service._desk.queue.free == 0
    assert service._desk.queue.free == 3
    with pytest.raises(QueueFull) as hopeless:
        service.reserve(4, rows=4, deadline=None)
    assert hopeless.value.retry_after is None
    with pytest.raises(RequestError, match="at most 0"):
        place.submit(order())
    with pytest.raises(RequestError, match="at most 1"):
        service.reserve(1, rows=4, deadline=None).submit(order(count=2))
    assert service._desk.idle


def test_a_burst_is_refused_by_exactly_its_excess(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=64)
    fakes.encoding.clear()  # nobody leaves the queue meanwhile
    tickets, refused = [], 0
    for seed in range(500):
        try:
            tickets.append(submit(service, order(seed=seed, steps=1)))
        except QueueFull:
            refused += 1
    assert (len(tickets), refused) == (64, 436)
    fakes.encoding.set()
    for ticket in tickets:
        wait(ticket.pictures())
    assert (service.waiting, service.running, service._desk.idle) == (0, 0, True)


def test_a_full_service_says_so_of_any_request_as_of_one_picture(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2, curve=Curve({SHAPE: {2: 1.0, 4: 2.0}}))
    fakes.encoding.clear()
    assert service.full() is service.full(1) is None
    assert "0 of 2 places" in str(service.full(2))
    with service.reserve(1, rows=4, deadline=None):
        assert service.full() is None
        ticket = submit(service, order())
        full = service.full()
        with pytest.raises(QueueFull) as refused:
            service.reserve(1, rows=4, deadline=None)
        assert full is not None
        assert (str(full), full.retry_after) == (str(refused.value), refused.value.retry_after)
        assert service.full() is full  # for a moment
        service.drain()
        assert service.full() is None  # something else is to be said
    ticket.cancel()
    assert service.full() is None


def test_what_cannot_be_in_time_is_refused_by_the_curve(serve: Serve, fakes: Fakes) -> None:
    """A tick takes a second here, so ten rows take ten, and behind as many, twenty."""
    service = serve(curve=Curve({SHAPE: {2: 1.0, 4: 2.0}}))
    fakes.hold()
    now = time.monotonic()
    service.reserve(1, rows=10, deadline=now + 11).release()
    with pytest.raises(DeadlineUnreachable, match=r"done in 10\.0 s") as never:
        service.reserve(1, rows=10, deadline=now + 9)
    assert never.value.retry_after is None
    running = submit(service, order(steps=10))
    fakes.wait_for(1)
    with pytest.raises(DeadlineUnreachable, match=r"done in 20\.0 s") as later:
        service.reserve(1, rows=10, deadline=now + 15)
    assert later.value.retry_after == pytest.approx(5, abs=1)
    running.cancel()


def test_who_waits_too_long_fails_and_leaves_its_place(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue_timeout=0.05)
    fakes.encoding.clear()
    ticket = submit(service, order())
    with pytest.raises(QueueTimeout):
        wait(ticket.pictures())
    assert service._desk.idle


@pytest.mark.parametrize("late", [{"run_timeout": 0.05}, {"deadline": 0.3}], ids=str)
def test_who_runs_too_long_fails_and_leaves_its_lanes(serve: Serve, fakes: Fakes, late: dict[str, float]) -> None:
    service = serve(**{name: value for name, value in late.items() if name != "deadline"})
    fakes.hold()
    ticket = submit(service, order(deadline=time.monotonic() + late["deadline"] if "deadline" in late else None))
    fakes.wait_for(1)
    with pytest.raises(RunTimeout):
        wait(ticket.pictures())
    fakes.allow(None)
    eventually(lambda: not service._engine.denoiser.jobs)
    assert fakes.steps == 1
    assert service.ready


def test_lanes_of_a_cancelled_order_are_free_within_two_ticks(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    leaving = submit(service, order(steps=50, count=4))
    fakes.wait_for(1)
    staying = submit(service, order(steps=3))
    eventually(lambda: not service._desk.queue.unprepared(1, 8))
    fakes.on_step = lambda step: leaving.cancel() if step == 5 else None
    fakes.allow(None)
    assert isinstance(wait(events(leaving))[-1], Failed)
    wait(staying.pictures())
    assert fakes.lanes == [8] * 5 + [2] * 3


def test_cancelling_what_waits_frees_its_places_at_once(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2)
    fakes.encoding.clear()
    ticket = submit(service, order(count=2))
    ticket.cancel()
    ticket.cancel()
    service.reserve(2, rows=1, deadline=None).release()
    for cancelled in (ticket, submit_and_cancel(service)):
        with pytest.raises(Cancelled):
            wait(cancelled.pictures())
