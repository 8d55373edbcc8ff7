"""Several clients and several sizes at one service: in ticks of a fake network, so that no machine is too busy."""

from __future__ import annotations

import time

import pytest

from latentrt.serve.core.errors import DeadlineUnreachable, QueueFull, QuotaExceeded
from latentrt.serve.core.handle import Handle, Stage
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.rules.terms import Terms
from latentrt.serve.core.service import Service
from tests.serve.conftest import Serve, all_prepared, eventually
from tests.support.serve.fake_engine import SHAPE, Fakes, events, handle_of, submit, wait

LARGE = {"width": 512, "height": 512}


def of(owner: str, *, terms: Terms = Terms(), **settings: float) -> Handle:  # noqa: B008
    handle = handle_of(**settings)
    handle.owner, handle.terms = owner, terms
    return handle


def arrive(service: Service, handle: Handle) -> Handle:
    """Submit a request and wait until it could run."""
    submit(service, handle)
    eventually(lambda: handle.over or all(slot.job is not None for slot in handle.slots))
    return handle


def moved(handle: Handle) -> bool:
    """Whether all its rows have run."""
    return all(slot.stage >= Stage.DENOISED for slot in handle.slots)


@pytest.mark.parametrize("steps", [4, 12])
def test_three_greedy_clients_do_not_make_a_modest_one_wait_twice_as_long(
    serve: Serve, fakes: Fakes, steps: int
) -> None:
    """Alone its picture takes as many ticks as it has steps. They ask for 20 at a time and hold all lanes."""
    service = serve(queue=64)
    fakes.hold()
    greedy = [submit(service, of(name, count=20, steps=25)) for name in ("a", "b", "c")]
    all_prepared(service)
    ticks, asked = list[int](), list[tuple[int, Handle]]()

    def on_step(step: int) -> None:
        if asked and moved(asked[-1][1]):
            began, handle = asked.pop()
            ticks.append(step - 1 - began)
            service.scheduler.release(handle)
        if not asked and len(ticks) < 12 and step % 7 == 3:
            asked.append((step, arrive(service, of("modest", steps=steps))))

    fakes.on_step = on_step
    fakes.allow(None)
    eventually(lambda: len(ticks) == 12)
    fakes.on_step = lambda step: None
    assert sorted(ticks)[-1] <= 2 * steps
    done = [len(wait(handle.pictures())) for handle in greedy]
    assert done == [20, 20, 20]  # what was paused went on


def test_paused_pictures_are_those_of_undisturbed_ones(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    wanted = [image.tobytes() for image in wait(submit(service, of("a", count=4, steps=9)).pictures())]
    fakes.lanes.clear()
    fakes.hold()
    many = submit(service, of("a", count=4, steps=9))
    fakes.wait_for(1)
    guests: list[Handle] = []
    fakes.on_step = lambda step: guests.append(arrive(service, of(f"b{step}", steps=2))) if step in (3, 6) else None
    fakes.allow(None)
    assert [image.tobytes() for image in wait(many.pictures())] == wanted
    assert len(guests) == 2


def test_a_small_picture_waits_for_one_tick_of_a_large_one(serve: Serve, fakes: Fakes) -> None:
    """Its own ticks cost no more than one of those."""
    service = serve()
    fakes.hold()
    large = arrive(service, of("a", steps=10, **LARGE))
    found: list[int] = []
    small: list[Handle] = []

    def on_step(_: int) -> None:
        if large.row == 2 and not small:
            small.append(arrive(service, of("a", steps=12)))
        if small and moved(small[0]) and not found:
            found.append(large.row)

    fakes.on_step = on_step
    fakes.allow(None)
    wait(events(large))
    assert found
    assert found[0] <= 3


def test_large_pictures_run_one_by_one_in_calls_of_one_lane(serve: Serve, fakes: Fakes) -> None:
    """One of 512 x 512 has 16 times the latents of the model's own, which all 8 lanes may have together."""
    service, at_once = serve(queue_timeout=1000, run_timeout=500), list[int]()
    fakes.hold()
    large = submit(service, of("a", count=3, steps=2, **LARGE))
    fakes.on_step = lambda step: at_once.append(sum(slot.stage is Stage.RUNNING for slot in large.slots))
    fakes.wait_for(1)
    limits = [slot.limit - time.monotonic() for slot in large.slots if slot.stage is Stage.WAITING]
    assert min(limits) > 1000  # their request has begun
    fakes.allow(None)
    assert len(wait(large.pictures())) == 3
    assert set(at_once) == {1}
    assert fakes.lanes == [1] * 3 * 2 * 2


def test_pictures_that_are_enlarged_run_as_the_large_ones_that_they_become(serve: Serve, fakes: Fakes) -> None:
    service, at_once = serve(), list[int]()
    fakes.hold()
    large = submit(service, of("a", count=2, steps=2, hires_scale=4.0))
    fakes.on_step = lambda step: at_once.append(sum(slot.stage is Stage.RUNNING for slot in large.slots))
    fakes.allow(None)
    assert len(wait(large.pictures())) == 2
    assert large.shape == (4, 64, 64)
    assert set(at_once) == {1}


# ---- At the door


def test_others_cannot_fill_the_queue_before_a_client_that_has_none_in_it(serve: Serve, fakes: Fakes) -> None:
    service = serve(queue=8)
    scheduler = service.scheduler
    fakes.encoding.clear()
    submit(service, of("a", count=8))
    with pytest.raises(QueueFull, match="0 of 8"):
        scheduler.reserve(of("a"))
    assert scheduler.full("a") is not None
    assert scheduler.full("b") is None
    scheduler.reserve(of("b", count=2))
    for owner in ("b", "c"):
        with pytest.raises(QueueFull):
            scheduler.reserve(of(owner))


def test_a_key_has_no_more_places_than_it_was_promised(serve: Serve, fakes: Fakes) -> None:
    service, terms = serve(), Terms(places=3)
    fakes.hold()
    first = submit(service, of("a", count=2, terms=terms))
    fakes.wait_for(1)
    with pytest.raises(QuotaExceeded, match="2 pictures beside 2") as later:
        service.scheduler.reserve(of("a", count=2, terms=terms))
    assert later.value.retry_after is not None
    with pytest.raises(QuotaExceeded) as never:
        service.scheduler.reserve(of("a", count=4, terms=terms))
    assert never.value.retry_after is None
    submit(service, of("b", count=4))
    service.scheduler.release(first)
    service.scheduler.reserve(of("a", count=3, terms=terms))


def test_a_forecast_counts_what_the_shares_put_before_a_request(serve: Serve, fakes: Fakes) -> None:
    """A tick takes 100 s, a picture runs, nine of its client wait; another's comes next, or last by priority."""
    service = serve(curve=Curve({SHAPE: {2: 100.0, 4: 200.0}}), queue_timeout=100_000)
    scheduler = service.scheduler
    fakes.hold()
    submit(service, of("a", count=10, steps=10))
    fakes.wait_for(1)
    for terms, seconds in ((Terms(), 2000), (Terms(priority=-1), 11_000)):
        handle = of("b", steps=10, terms=terms)
        handle.deadline = time.monotonic() + seconds - 100
        with pytest.raises(DeadlineUnreachable, match=rf"in {seconds}\.0 s"):
            scheduler.reserve(handle)
