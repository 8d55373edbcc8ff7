"""The service on a GPU, emulated: one thread does everything, and every call has the same lanes."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from latentrt import Engine
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.serve.core.errors import Cancelled, EngineFault
from latentrt.serve.core.handle import Finished, Preview
from latentrt.serve.core.measured.footprint import budget_of, measured
from latentrt.serve.core.service import Service
from tests.serve.conftest import eventually
from tests.support.gpu.host_gpu import HostGpu
from tests.support.serve.fake_engine import events, handle_of, recorded, submit, wait

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
        eventually(lambda: service.scheduler.ready)
        yield service
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("latentrt-")]
    assert not on_gpu.denoiser.jobs


def test_company_changes_no_bit(service: Service, on_gpu: Engine) -> None:
    made = recorded(on_gpu)

    def draw(*, together: bool) -> None:
        wanted = [
            handle_of("a cat", seed=3, **SIZE),
            handle_of("an owl", guidance=1.0, solver="euler-ancestral", **SIZE),
        ]
        if together:
            for one in wanted:
                submit(service, one)
        for one in wanted:
            if not together:
                submit(service, one)
            wait(one.pictures())

    draw(together=True)
    shared = {job.tag["prompt"]: job.latents for job in made}
    made.clear()
    draw(together=False)
    del on_gpu.jobs  # the recording one
    for job in made:
        np.testing.assert_array_equal(job.latents, shared[job.tag["prompt"]])


def test_there_is_no_second_thread_for_the_device(service: Service) -> None:
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("latentrt-")}
    assert names == {"latentrt-engine", "latentrt-clock"}
    told = wait(events(submit(service, handle_of(steps=6, previews=2, **SIZE))))
    numbers = [event.number for event in told if isinstance(event, Preview)]
    assert numbers in ([0, 1], [1])  # a client that listens late hears of the newest alone
    assert isinstance(told[-1], Finished)


def test_cancelled_lanes_are_free_again(service: Service) -> None:
    leaving = submit(service, handle_of(count=2, steps=500, **SIZE))
    eventually(lambda: leaving.started)
    staying = submit(service, handle_of(steps=2, **SIZE))
    service.scheduler.cancel(leaving)
    with pytest.raises(Cancelled):
        wait(leaving.pictures())
    assert len(wait(staying.pictures())) == 1


def test_what_is_there_is_a_picture(service: Service) -> None:
    stopped = submit(service, handle_of(steps=500, **SIZE))
    eventually(lambda: stopped.started)
    service.scheduler.stop(stopped)
    (made,) = wait(stopped.pictures())
    assert made.size == (32, 40)
    assert made.info["latentrt"]["stopped_after"] < 500
    assert len(wait(submit(service, handle_of(steps=2, **SIZE)).pictures())) == 1


def test_a_step_that_raises_fails_all_that_run_and_those_that_wait_go_on(
    service: Service, on_gpu: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's memory may hold anything then."""
    lanes, raised = on_gpu.denoiser._lanes, threading.Event()
    advance = lanes.advance

    def failing(jobs: list[object]) -> None:
        if len(jobs) == 2 and not raised.is_set():
            raised.set()
            raise RuntimeError("the device is lost")
        advance(jobs)  # type: ignore[arg-type]

    monkeypatch.setattr(lanes, "advance", failing)
    handles = [submit(service, handle_of(steps=20, **SIZE)) for _ in range(3)]
    for handle in handles[:2]:
        with pytest.raises(EngineFault, match="the device is lost"):
            wait(handle.pictures())
    assert len(wait(handles[2].pictures())) == 1
    eventually(lambda: service.scheduler.ready)


def test_what_surely_does_not_fit_is_known() -> None:
    """By what all lanes keep at the model's own size, in proportion; lanes are not fewer for large pictures."""
    gpu = HostGpu()
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as engine:
        ((shape, taken),) = measured(engine).items()
        assert shape == engine.spec.latents.shape_of(None, None)
        assert taken.lane > 0
        budget = budget_of(engine, {shape: taken}, 2 * taken.lane, 10**6)
        assert (budget.largest(10**6), budget.cap((4, 100, 100)), budget.tile) == (2 * 16 * 16, 4, None)
    gpu.close()
