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
from latentrt.serve.core import health, pipeline
from latentrt.serve.core.errors import EngineFault, NotReady
from latentrt.serve.core.handle import Handle, Stage
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.service import Service
from tests.serve.conftest import Serve, all_prepared, at_stage, eventually
from tests.support.serve.fake_engine import (
    HANGS,
    NAN,
    PATIENCE,
    RAISES,
    Fakes,
    fake_engine,
    handle_of,
    recorded,
    submit,
    wait,
)

TIMES = 5


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A self-check that failed is soon repeated."""
    monkeypatch.setattr(health, "CHECK_AGAIN", 0.01)


def together(service: Service, fakes: Fakes, *handles: Handle) -> None:
    """Have all pictures of these requests share a step."""
    fakes.hold()
    first = submit(service, handle_of(steps=1, guidance=1.0))
    fakes.wait_for(fakes.steps + (0 if fakes.lanes else 1))
    for handle in handles:
        submit(service, handle)
    all_prepared(service)
    fakes.allow(None)
    wait(first.pictures())


class Faults(Observer):
    """Remembers whether each fault was a hang."""

    def __init__(self) -> None:
        self.heard: list[bool] = []

    def faulted(self, hung: bool) -> None:
        self.heard.append(hung)


def failure(handle: Handle) -> LatentrtError:
    """What a request failed with."""
    with pytest.raises(LatentrtError) as raised:
        wait(handle.pictures())
    return raised.value


def is_well(service: Service) -> None:
    """It heals by itself, and makes pictures."""
    scheduler = service.scheduler
    eventually(lambda: scheduler.ready)
    assert len(wait(submit(service, handle_of(steps=1)).pictures())) == 1
    eventually(lambda: not scheduler._line.slots)
    assert (scheduler.waiting, scheduler.running) == (0, 0)


def test_a_step_that_raises_fails_the_one_that_raises_alone(serve: Serve, fakes: Fakes, engine: Engine) -> None:
    faults = Faults()
    service = serve(observer=faults)
    made = recorded(engine)
    for time in range(TIMES):
        made.clear()
        fakes.lanes.clear()
        good, bad = handle_of(seed=1, steps=3, solver="euler-ancestral"), handle_of(RAISES)
        other = handle_of(seed=2, steps=5)
        together(service, fakes, good, bad, other)
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
    denoiser = Denoiser(HostLanes(engine.model.predictor, 2))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    return job.latents


def test_the_engine_is_not_trusted_until_a_self_check_passes(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.broken.add("unet")
        fakes.hold()
        handles = [submit(service, handle_of()), submit(service, handle_of(count=2))]
        fakes.allow(None)
        for handle in handles:
            assert isinstance(failure(handle), EngineFault)
        eventually(lambda: service.scheduler.state == "failed")
        with pytest.raises(NotReady, match="the UNet is broken"):
            submit(service, handle_of())
        fakes.broken.clear()
        is_well(service)


def test_a_service_whose_engine_is_broken_from_the_start_is_not_ready(fakes: Fakes) -> None:
    fakes.broken.add("vae")
    with fake_engine(fakes) as engine, Service(engine) as service:
        eventually(lambda: service.scheduler.state == "failed")
        with pytest.raises(NotReady, match="the VAE is broken"):
            submit(service, handle_of())
        fakes.broken.clear()
        is_well(service)


def test_requests_that_wait_when_a_step_raises_are_made_afterwards(serve: Serve, fakes: Fakes) -> None:
    for _ in range(TIMES):
        service = serve()
        fakes.hold()
        sick, *others = [submit(service, one) for one in (handle_of(RAISES), *(handle_of(count=4) for _ in range(3)))]
        fakes.allow(None)
        assert isinstance(failure(sick), EngineFault)
        assert [len(wait(handle.pictures())) for handle in others] == [4, 4, 4]


def test_latents_that_turn_nan_fail_alone_and_are_no_fault(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.lanes.clear()
        sick, healthy = handle_of(NAN), handle_of(count=2)
        together(service, fakes, sick, healthy)
        assert isinstance(failure(sick), NetworkError)
        assert len(wait(healthy.pictures())) == 2
        assert service.scheduler.ready
        is_well(service)


def test_a_picture_that_decodes_to_nan_fails_its_request_and_is_no_fault(serve: Serve, fakes: Fakes) -> None:
    service = serve()
    for _ in range(TIMES):
        fakes.nan_pictures = 1
        sick, healthy = submit(service, handle_of(count=2, steps=1)), submit(service, handle_of())
        assert isinstance(failure(sick), NetworkError)
        assert len(wait(healthy.pictures())) == 1
        assert service.scheduler.ready
        is_well(service)


@pytest.mark.parametrize("network", ["text", "vae"])
def test_a_stage_that_raises_fails_its_request(serve: Serve, fakes: Fakes, network: str) -> None:
    service = serve()
    for time in range(TIMES):
        fakes.broken.add(network)
        handle = submit(service, handle_of(f"a prompt never seen before, number {time}"))
        assert isinstance(failure(handle), EngineFault)
        fakes.broken.clear()
        is_well(service)


@pytest.mark.parametrize("network", ["text", "unet", "vae"])
def test_a_client_that_hears_of_a_fault_finds_the_server_unready(
    serve: Serve, fakes: Fakes, network: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not about to be: the next request would be taken by an engine that is not trusted."""
    service, states, fail = serve(), list[str](), Handle.fail

    def seen(handle: Handle, error: LatentrtError) -> None:
        states.append(service.scheduler.state)
        fail(handle, error)

    monkeypatch.setattr(Handle, "fail", seen)
    fakes.broken.add(network)
    failure(submit(service, handle_of("a prompt never seen before")))
    assert states == ["failed"]


def test_nothing_else_uses_the_engine_during_a_self_check(
    serve: Serve, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, check, seen = serve(hang=PATIENCE), pipeline.check, list[Any]()
    scheduler = service.scheduler

    def seeing(engine: Engine) -> None:
        seen.append((set(scheduler._health._calls), scheduler._side_work()))
        check(engine)

    monkeypatch.setattr(pipeline, "check", seeing)
    for time in range(TIMES):
        fakes.decoding.clear()
        slow = submit(service, handle_of(steps=1))
        eventually(lambda: at_stage(service, Stage.DECODING))
        waits = submit(service, handle_of(f"a prompt never seen before, number {time}", count=8))
        scheduler.suspect(EngineFault("a mistake", needed="none"))
        assert not scheduler.check_due
        assert len(seen) == time
        fakes.decoding.set()
        assert [len(wait(one.pictures())) for one in (slow, waits)] == [1, 8]
        is_well(service)
    assert seen == [({"self-check"}, None)] * TIMES


@pytest.mark.parametrize("where", ["step", "stage"])
def test_what_hangs_is_noticed_and_heals_when_it_returns(fakes: Fakes, serve: Serve, where: str) -> None:
    """The thread cannot be ended: all requests are told, and nothing new is taken."""
    faults = Faults()
    service = serve(observer=faults)
    health, patience = service.scheduler._health, service.scheduler._health.hang
    for time in range(2):
        if where == "step":
            hanging = submit(service, handle_of(HANGS))
        else:
            fakes.decoding.clear()
            hanging = submit(service, handle_of(steps=1))
        eventually(lambda: fakes.steps)
        company = submit(service, handle_of(steps=50))
        health.hang = 0.0  # now the call hangs
        service.scheduler.submit(company)  # wakes the clock
        for handle in (hanging, company):
            assert "has not returned" in str(failure(handle))
        assert service.scheduler.state == "failed"
        health.hang = patience
        assert len(faults.heard) > time
        assert all(faults.heard)
        with pytest.raises(NotReady):
            submit(service, handle_of())
        fakes.wakes.set()
        fakes.decoding.set()
        is_well(service)
        fakes.wakes.clear()
        fakes.lanes.clear()


def test_what_hangs_twice_as_long_is_said_so_that_the_process_can_end(fakes: Fakes, serve: Serve) -> None:
    lost = threading.Event()
    service = serve(hang=0.2, on_hang=lost.set)
    submit(service, handle_of(HANGS))
    assert lost.wait(PATIENCE)


def test_a_thread_survives_our_own_mistakes(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where something raises that should not, the requests there are fail, and the next ones are made."""
    service = serve()
    for name in ("prepared", "finish", "ticked"):
        function: Callable[..., Any] = getattr(service.scheduler, name)
        raised = threading.Event()

        def mistaken(*arguments: Any, own: Any = function, once: threading.Event = raised) -> Any:
            if not once.is_set():
                once.set()
                raise ZeroDivisionError("a mistake")
            return own(*arguments)

        monkeypatch.setattr(service.scheduler, name, mistaken)
        assert isinstance(failure(submit(service, handle_of())), EngineFault)
        is_well(service)
    assert "latentrt-side raised" in caplog.text
    assert "latentrt-engine raised" in caplog.text


def test_an_engine_that_cannot_admit_fails_the_picture(
    serve: Serve, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = serve()
    with monkeypatch.context() as patch:
        patch.setattr(engine.denoiser._lanes, "admit", _no_memory)
        assert isinstance(failure(submit(service, handle_of())), EngineFault)
    is_well(service)


def _no_memory(job: Any) -> None:
    raise MemoryError
