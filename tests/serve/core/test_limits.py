"""The scheduler under load: places, deadlines, timeouts and requests that are given up."""

from __future__ import annotations

import time

import pytest

from latentrt.errors import LatentrtError
from latentrt.serve.core.errors import Cancelled, DeadlineUnreachable, QueueFull, QueueTimeout, RunTimeout
from latentrt.serve.core.measured.curve import Curve
from tests.serve.conftest import Serve, all_prepared, eventually
from tests.support.serve.fake_engine import PATIENCE, SHAPE, Fakes, events, handle_of, submit, wait


def test_places_are_counted_and_given_back(serve: Serve) -> None:
    scheduler, two = serve(queue=3).scheduler, handle_of(count=2)
    scheduler.reserve(two)
    with pytest.raises(QueueFull, match="1 of 3 places") as refused:
        scheduler.reserve(handle_of(count=2))
    assert refused.value.retry_after is not None
    assert refused.value.retry_after >= 1
    assert scheduler.waiting == 2
    scheduler.release(two)
    scheduler.release(two)
    assert scheduler.waiting == 0
    scheduler.reserve(handle_of(count=3))
    assert scheduler.waiting == 3
    with pytest.raises(QueueFull) as hopeless:
        scheduler.reserve(handle_of(count=4))
    assert hopeless.value.retry_after is None


def test_what_is_reserved_has_no_lanes_before_it_is_submitted(serve: Serve, fakes: Fakes) -> None:
    service, reserved = serve(), handle_of(steps=1)
    service.scheduler.reserve(reserved)
    wait(submit(service, handle_of(steps=1)).pictures())
    assert (service.scheduler.waiting, reserved.started) == (1, None)
    service.scheduler.submit(reserved)
    assert len(wait(reserved.pictures())) == 1


def test_of_a_burst_exactly_the_excess_is_refused(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=64)
    fakes.encoding.clear()  # nothing leaves the queue meanwhile
    handles, refused = [], 0
    for seed in range(500):
        try:
            handles.append(submit(service, handle_of(seed=seed, steps=1)))
        except QueueFull:
            refused += 1
    assert (len(handles), refused) == (64, 436)
    fakes.encoding.set()
    for handle in handles:
        wait(handle.pictures())
    assert (service.scheduler.waiting, service.scheduler.running) == (0, 0)


def test_a_full_queue_says_so_of_any_request_as_of_one_picture(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2, curve=Curve({SHAPE: {2: 1.0, 4: 2.0}}))
    scheduler = service.scheduler
    fakes.encoding.clear()
    scheduler.reserve(handle_of())
    assert scheduler.full() is None
    handle = submit(service, handle_of())
    full = scheduler.full()
    with pytest.raises(QueueFull) as refused:
        scheduler.reserve(handle_of())
    assert full is not None
    assert (str(full), full.retry_after) == (str(refused.value), refused.value.retry_after)
    scheduler.cancel(handle)
    assert scheduler.full() is None
    submit(service, handle_of())
    scheduler.drain()
    assert scheduler.full() is None  # something else is to be said


def test_what_cannot_be_in_time_is_refused_by_the_curve(serve: Serve, fakes: Fakes) -> None:
    """A tick takes 100 s here, so ten rows take 1000 s, and behind as many, 2000 s."""
    service = serve(curve=Curve({SHAPE: {2: 100.0, 4: 200.0}}), queue_timeout=10_000)
    scheduler, now = service.scheduler, time.monotonic()
    fakes.hold()
    fits = handle_of(steps=10, deadline=now + 1900)
    scheduler.reserve(fits)
    scheduler.release(fits)
    with pytest.raises(DeadlineUnreachable, match=r"done in 1000\.0 s") as never:
        scheduler.reserve(handle_of(steps=10, deadline=now + 900))
    assert never.value.retry_after is None
    submit(service, handle_of(steps=10))
    fakes.wait_for(1)
    with pytest.raises(DeadlineUnreachable, match=r"done in 2000\.0 s") as later:
        scheduler.reserve(handle_of(steps=10, deadline=now + 1900))
    assert later.value.retry_after is not None
    assert 100 <= later.value.retry_after < 1000


def test_a_picture_that_waits_too_long_fails_and_leaves_its_place(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue_timeout=0.05)
    fakes.encoding.clear()
    with pytest.raises(QueueTimeout):
        wait(submit(service, handle_of()).pictures())
    assert service.scheduler.waiting == 0


def test_a_picture_that_runs_too_long_fails_and_leaves_its_lanes(serve: Serve, fakes: Fakes) -> None:
    service = serve(run_timeout=PATIENCE)
    fakes.hold()
    handle = submit(service, handle_of())
    fakes.wait_for(1)
    (slot,) = handle.slots
    assert 0 < slot.limit - time.monotonic() <= PATIENCE
    slot.limit = time.monotonic()
    submit(service, handle_of())  # wakes the clock
    with pytest.raises(RunTimeout):
        wait(handle.pictures())
    fakes.allow(None)
    eventually(lambda: not service.scheduler._line.slots)
    assert service.scheduler.ready


def test_a_deadline_is_a_limit_of_waiting_and_of_running(serve: Serve, fakes: Fakes) -> None:
    service, deadline = serve(), time.monotonic() + 100
    fakes.hold()
    handle = handle_of(deadline=deadline)
    service.scheduler.reserve(handle)
    assert handle.slots[0].limit == deadline
    service.scheduler.submit(handle)
    fakes.wait_for(1)
    assert handle.slots[0].limit == deadline


def test_lanes_of_a_cancelled_request_are_free_within_two_ticks(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    fakes.hold()
    leaving = submit(service, handle_of(steps=50, count=4))
    fakes.wait_for(1)
    staying = submit(service, handle_of(steps=3))
    all_prepared(service)
    fakes.on_step = lambda step: service.scheduler.cancel(leaving) if step == 5 else None
    fakes.allow(None)
    with pytest.raises(Cancelled):
        wait(events(leaving))
    wait(staying.pictures())
    assert fakes.lanes == [8] * 5 + [2] * 3


def test_cancelling_what_waits_frees_its_places_at_once(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=2)
    fakes.encoding.clear()
    handle = submit(service, handle_of(count=2))
    service.scheduler.cancel(handle)
    service.scheduler.cancel(handle)
    service.scheduler.reserve(handle_of(count=2))
    with pytest.raises(LatentrtError, match="cancelled"):
        wait(handle.pictures())
