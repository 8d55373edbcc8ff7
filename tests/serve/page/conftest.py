"""A browser before the page of a server: a real scheduler over fake networks, or a fake scheduler."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from selenium.webdriver import Chrome

from latentrt.serve.core.service import Service
from latentrt.serve.http.app import create_app
from tests.serve.conftest import eventually
from tests.support.serve.browser import Visitor, chromium
from tests.support.serve.fake_engine import Fakes, fake_engine
from tests.support.serve.fakes import FakeScheduler, app_of, catalog_of, live


@pytest.fixture(scope="session")
def chrome() -> Iterator[Chrome]:
    with chromium() as chrome:
        yield chrome


@pytest.fixture(scope="module")
def drawing() -> Iterator[tuple[str, Fakes]]:
    """A real service over fake networks: its URL, and the networks' strings."""
    fakes = Fakes()
    with fake_engine(fakes) as engine, Service(engine) as service:
        eventually(lambda: service.scheduler.ready)
        with live(create_app(service.scheduler, catalog_of())) as url:
            yield url, fakes
            fakes.allow(None)


@pytest.fixture
def fakes(drawing: tuple[str, Fakes]) -> Iterator[Fakes]:
    yield drawing[1]
    drawing[1].allow(None)


@pytest.fixture
def page(chrome: Chrome, drawing: tuple[str, Fakes]) -> Iterator[Visitor]:
    """The page of that service; nothing may have been complained of on the console."""
    visitor = Visitor(chrome, drawing[0])
    yield visitor.visit()
    assert visitor.complaints() == []


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def url(scheduler: FakeScheduler) -> Iterator[str]:
    with live(app_of(scheduler)) as url:
        yield url


@pytest.fixture
def flat(chrome: Chrome, url: str) -> Iterator[Visitor]:
    """The page of a scheduler that is a fake itself."""
    visitor = Visitor(chrome, url)
    yield visitor.visit()
    assert visitor.complaints() == []
