"""Faults, each repeatedly: the one request fails with its error, the rest go on, and nothing is lost silently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.errors import LatentrtError, NetworkError
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes
from latentrt.serve.core import stages
from latentrt.serve.core.observer import Silent
from latentrt.serve.core.service import Service
from latentrt.serve.core.ticket import EngineFault, Event, Failed, NotReady, Order, Picture, Ticket
from tests.serve.conftest import Serve, eventually
from tests.support.serve.fake_engine import HANGS, NAN, RAISES, Fakes, fake_engine, order, recorded, wait

TIMES = 5


def submit(service: Service, wanted: Order) -> Ticket:
    request = wanted.request
    return service.reserve(request.count, rows=request.steps, deadline=wanted.deadline).submit(wanted)


def together(service: Service, fakes: Fakes, *orders: Order) -> list[Ticket]:
    """Orders whose pictures all have lanes in the same step."""
    fakes.hold()
    first = submit(service, order(steps=1, guidance=1.0))
    fakes.wait_for(fakes.steps + (0 if fakes.lanes else 1))
    tickets = [submit(service, one) for one in orders]
    eventually(lambda: not service._desk.queue.unprepared(1, 8))
    fakes.allow(None)
    wait(first.pictures())
    return tickets


class Faults(Silent):
    """Remembers faults."""

    def __init__(self) -> None:
        self.heard: list[tuple[LatentrtError, bool]] = []

    def faulted(self, error: LatentrtError, hung: bool) -> None:
        self.heard.append((error, hung))


def failure(ticket: Ticket) -> LatentrtError:
    """What an order failed with."""
    with pytest.raises(LatentrtError) as raised:
        wait(ticket.pictures())
    return raised.value


def is_well(service: Service) -> None:
    """It heals by itself, and makes pictures."""
    eventually(lambda: service.ready)
    assert len(wait(submit(service, order(steps=1)).pictures())) == 1
    eventually(lambda: service._desk.idle and not service._engine.denoiser.jobs)
    assert (service.waiting, service.running) == (0, 0)


def test_a_step_that_raises_fails_the_one_that_raises_alone(serve: Serve, fakes: Fakes, engine: Engine) -> None:
    faults = Faults()
    service = serve(observer=faults)
    made = recorded(engine)
    for time in range(TIMES):
        made.clear()
        fakes.lanes.clear()
        orders = [order(seed=1, steps=3, solver="euler-ancestral"), order(RAISES), order(seed=2, steps=5)]
        good, bad, other = together(service, fakes, *orders)
        error = failure(bad)
        assert isinstance(error, EngineFault)
        assert (error.code, str(error.__cause__)) == ("engine_error", "boom")
        assert len(wait(good.pictures())) == len(wait(other.pictures())) == 1
        for job in list(made):
            if job.done and job.tag["prompt"] != RAISES:
                np.testing.assert_array_equal(job.latents, _alone(engine, job.tag))
        is_well(service)
        assert len(faults.heard) == time + 1


def _alone(engine: Engine, tag: dict[str, Any]) -> Any:
    settings = {name: tag[name] for name in ("steps", "solver", "seed", "guidance")}
    (job,) = engine.requests([tag["prompt"]], settings)
    denoiser = Denoiser(HostLanes(engine.unet, 2))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    return job.latents


def test_the_engine_is_not_trusted_until_a_self_check_passes(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.broken.add("unet")
        fakes.hold()
        tickets = [submit(service, order()), submit(service, order(count=2))]
        fakes.allow(None)
        for ticket in tickets:
            assert isinstance(failure(ticket), EngineFault)
        eventually(lambda: service.state == "failed")
        with pytest.raises(NotReady, match="the UNet is broken"):
            service.reserve(1, rows=1, deadline=None)
        with pytest.raises(LatentrtError, match="the UNet is broken"):
            service.self_check()
        fakes.broken.clear()
        service.self_check()
        is_well(service)


def test_a_service_whose_engine_is_broken_from_the_start_is_never_ready(fakes: Fakes, serve: Serve) -> None:
    fakes.broken.add("vae")
    with fake_engine(fakes) as engine, Service(engine) as service:
        with pytest.raises(LatentrtError, match="the VAE is broken"):
            service.self_check()
        assert service.state == "failed"
        fakes.broken.clear()
        service.self_check()
        is_well(service)


def test_orders_that_wait_when_a_step_raises_are_made_afterwards(serve: Serve, fakes: Fakes) -> None:
    for _ in range(TIMES):
        service = serve()
        fakes.hold()
        tickets = [submit(service, order(RAISES)), *[submit(service, order(count=4)) for _ in range(3)]]
        fakes.allow(None)
        assert isinstance(failure(tickets[0]), EngineFault)
        assert [len(wait(ticket.pictures())) for ticket in tickets[1:]] == [4, 4, 4]


def test_latents_that_turn_nan_fail_alone_and_are_no_fault(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.lanes.clear()
        sick, healthy = together(service, fakes, order(NAN), order(count=2))
        assert isinstance(failure(sick), NetworkError)
        assert len(wait(healthy.pictures())) == 2
        assert service.ready
        is_well(service)


def test_a_picture_that_decodes_to_nan_fails_alone(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.nan_pictures = 1
        told = [event for event in _story(submit(service, order(count=3, steps=1))) if hasattr(event, "index")]
        assert len([event for event in told if isinstance(event, Failed)]) == 1
        assert len([event for event in told if isinstance(event, Picture)]) == 2
        is_well(service)


def _story(ticket: Ticket) -> list[Any]:
    async def events() -> list[Any]:
        return [event async for event in ticket]

    return wait(events())


@pytest.mark.parametrize("network", ["text", "vae"])
def test_a_stage_that_raises_fails_its_orders(serve: Serve, fakes: Fakes, network: str) -> None:
    service = serve()
    for time in range(TIMES):
        fakes.broken.add(network)
        ticket = submit(service, order(f"a prompt never seen before, number {time}"))
        assert isinstance(failure(ticket), EngineFault)
        fakes.broken.clear()
        service.self_check()
        is_well(service)


@pytest.mark.parametrize("network", ["text", "unet", "vae"])
def test_who_hears_of_a_fault_finds_the_service_unready(
    serve: Serve, fakes: Fakes, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not about to be: what is ordered next would be taken by an engine that nobody trusts."""
    service, states, tell = serve(), list[str](), Ticket.tell

    def seen(ticket: Ticket, event: Event, *, last: bool = False) -> None:
        if isinstance(event, Failed):
            states.append(service.state)
        tell(ticket, event, last=last)

    monkeypatch.setattr(Ticket, "tell", seen)
    fakes.broken.add(network)
    failure(submit(service, order("a prompt never seen before")))
    assert states == ["failed"]


@pytest.mark.parametrize("where", ["step", "stage"])
def test_what_hangs_is_noticed_and_heals_when_it_returns(fakes: Fakes, serve: Serve, where: str) -> None:
    """The thread cannot be ended; everybody is told, nothing new is taken, and the observer may end the process."""
    faults = Faults()
    service = serve(observer=faults, hang=0.6)
    for time in range(2):
        if where == "step":
            hanging = submit(service, order(HANGS))
        else:
            fakes.decoding.clear()
            hanging = submit(service, order(steps=1))
        eventually(lambda: fakes.steps)
        company = submit(service, order(steps=50))
        for ticket in (hanging, company):
            assert "has not returned" in str(failure(ticket))
        assert service.state == "failed"
        assert len(faults.heard) > time
        assert all(hung for _, hung in faults.heard)
        with pytest.raises(NotReady):
            service.reserve(1, rows=1, deadline=None)
        fakes.wakes.set()
        fakes.decoding.set()
        is_well(service)
        fakes.wakes.clear()
        fakes.lanes.clear()


def test_a_thread_survives_our_own_mistakes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises where nothing should: the orders there are fail, and the next ones are made."""
    service = serve()
    for name in ("prepare", "draw"):
        function: Callable[..., Any] = getattr(stages, name)
        raised = threading.Event()

        def mistaken(*arguments: Any, own: Any = function, once: threading.Event = raised) -> Any:
            if not once.is_set():
                once.set()
                raise ZeroDivisionError("a mistake")
            return own(*arguments)

        monkeypatch.setattr(stages, name, mistaken)
        assert isinstance(failure(submit(service, order())), EngineFault)
        is_well(service)
    assert "latentrt-studio raised" in caplog.text


def test_an_engine_that_cannot_admit_fails_the_picture(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    with monkeypatch.context() as patch:
        patch.setattr(engine.denoiser._lanes, "admit", _no_memory)
        assert isinstance(failure(submit(service, order())), EngineFault)
    service.self_check()
    is_well(service)


def _no_memory(job: Any) -> None:
    raise MemoryError
