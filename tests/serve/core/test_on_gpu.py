"""The service on a GPU, emulated: one thread does everything, and every call has the same lanes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.serve.core.service import Service
from latentrt.serve.core.ticket import Cancelled, Failed, Order, Picture, Preview, Ticket
from tests.serve.conftest import eventually
from tests.support.gpu.host_gpu import HostGpu
from tests.support.serve.fake_engine import PATIENCE, order, recorded, wait

SIZE = {"width": 32, "height": 40}


@pytest.fixture(scope="module")
def on_gpu() -> Iterator[Engine]:
    gpu = HostGpu()
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as engine:
        yield engine
    gpu.close()


@pytest.fixture
def service(on_gpu: Engine) -> Iterator[Service]:
    with Service(on_gpu) as service:
        service.self_check(PATIENCE)
        yield service
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latentrt-")]
    assert not on_gpu.denoiser.jobs


def submit(service: Service, wanted: Order) -> Ticket:
    return service.reserve(wanted.request.count, rows=wanted.request.steps, deadline=None).submit(wanted)


async def story(ticket: Ticket) -> list[Any]:
    return [event async for event in ticket]


def test_company_changes_no_bit(service: Service, on_gpu: Engine) -> None:
    made = recorded(on_gpu)
    wanted = [order("a cat", seed=3, **SIZE), order("an owl", guidance=1.0, solver="euler-ancestral", **SIZE)]
    for ticket in [submit(service, one) for one in wanted]:
        wait(ticket.pictures())
    shared = {job.tag["prompt"]: job.latents for job in made}
    made.clear()
    for one in wanted:
        wait(submit(service, one).pictures())
    del on_gpu.jobs  # the recording one
    for job in made:
        np.testing.assert_array_equal(job.latents, shared[job.tag["prompt"]])


def test_there_is_no_second_thread_for_the_device(service: Service) -> None:
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("latentrt-")}
    assert names == {"latentrt-engine", "latentrt-clock"}
    told = wait(story(submit(service, order(steps=6, previews=2, **SIZE))))
    numbers = [event.number for event in told if isinstance(event, Preview)]
    assert numbers in ([0, 1], [1])  # who listens late hears of the newest alone
    assert isinstance(told[-1], Picture)


def test_cancelled_lanes_are_free_again(service: Service) -> None:
    leaving = submit(service, order(count=2, steps=500, **SIZE))
    eventually(lambda: leaving.begun)
    staying = submit(service, order(steps=2, **SIZE))
    leaving.cancel()
    with pytest.raises(Cancelled):
        wait(leaving.pictures())
    assert len(wait(staying.pictures())) == 1


def test_a_step_that_raises_fails_all_that_run_and_those_that_wait_go_on(
    service: Service, on_gpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody knows what the device's memory holds then."""
    lanes, raised = on_gpu.denoiser._lanes, threading.Event()
    advance = lanes.advance

    def failing(jobs: list[object]) -> None:
        if len(jobs) == 2 and not raised.is_set():
            raised.set()
            raise RuntimeError("the device is lost")
        advance(jobs)  # type: ignore[arg-type]

    monkeypatch.setattr(lanes, "advance", failing)
    told = wait(story(submit(service, order(steps=20, count=3, **SIZE))))
    causes = [str(event.error.__cause__) for event in told if isinstance(event, Failed)]
    assert causes == ["the device is lost"] * 2
    assert isinstance(told[-1], Picture)
    eventually(lambda: service.ready)
