"""A fake engine, and a service over it that leaves no thread behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from latentrt.engine import Engine
from latentrt.serve.core.handle import Slot, Stage
from latentrt.serve.core.queue import Limits
from latentrt.serve.core.service import Service
from tests.support.serve.fake_engine import PATIENCE, Fakes, fake_engine

Serve = Callable[..., Service]


@pytest.fixture
def fakes() -> Fakes:
    return Fakes()


@pytest.fixture
def engine(fakes: Fakes) -> Iterator[Engine]:
    with fake_engine(fakes) as engine:
        yield engine


@pytest.fixture(scope="module")
def embedded() -> Iterator[Engine]:
    """The embedded model, on one thread: others may have the cores."""
    with Engine.load(threads=1, check_hashes=False) as engine:
        yield engine


@pytest.fixture
def serve(fakes: Fakes, engine: Engine) -> Iterator[Serve]:
    """Makes services of the fake engine, by default, that are ready; `Fakes.lanes` begins after the self-check."""
    services: list[Service] = []

    def start(own: Engine = engine, **settings: Any) -> Service:
        limits = {name: settings.pop(name) for name in Limits._fields if name in settings}
        service = Service(own, Limits(**limits), **settings)
        services.append(service)
        eventually(lambda: service.scheduler.state != "starting")
        fakes.lanes.clear()
        fakes.texts.clear()
        fakes.decoded.clear()
        return service

    yield start
    fakes.allow(None)
    fakes.wakes.set()
    fakes.decoding.set()
    fakes.encoding.set()
    for service in services:
        service.close()
    assert left_threads() == []


def left_threads() -> list[str]:
    """Names of the service's threads that still run."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("latentrt-")]


def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds that another thread brings about."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def at_stage(service: Service, *stages: Stage) -> list[Slot]:
    """The pictures that are so far."""
    return [slot for handle in service.scheduler.handles for slot in handle.slots if slot.stage in stages]


def all_prepared(service: Service) -> None:
    """Wait until there is nothing to prepare now."""
    scheduler = service.scheduler
    eventually(lambda: (work := scheduler._side_work()) is None or work.slot is not None)
