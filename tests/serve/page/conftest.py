"""A browser before the page of a server: a real scheduler over fake networks, or a fake scheduler."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs

import pytest
from selenium.webdriver import Chrome
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.bundle.bundle import Bundle
from latentrt.model.model import Model
from latentrt.runtime.fake import FakeBackend
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


def guided_by(scheduler: FakeScheduler, *names: str, shows: tuple[str, ...] = ()) -> Any:
    """Return the application of a server with these ControlNets, and IP-Adapters that show pictures."""
    model = Model(Bundle.open(check_hashes=False), FakeBackend())
    named: Any = [SimpleNamespace(name=name, spec=SimpleNamespace(kind="controlnet")) for name in names]
    model.controls = tuple(named)
    looks: Any = tuple(SimpleNamespace(name=name) for name in shows)
    model.ip_adapters = looks
    return app_of(scheduler, model, controlnet=tuple(f"{name}=some/" for name in names))


class Told:
    """Adds to what /latentrt/model tells: to all, and `of` one by its name; others than these cannot be loaded."""

    def __init__(self, app: ASGIApp, of: Mapping[str, Any] | None = None, **more: Any) -> None:
        self._app, self._of, self._more = app, of or {}, more

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != "/latentrt/model":
            return await self._app(scope, receive, send)
        told: list[Message] = []

        async def keep(message: Message) -> None:
            told.append(message)

        await self._app({**scope, "query_string": b""}, receive, keep)  # of the one that there is
        body = json.loads(b"".join(message.get("body", b"") for message in told))
        (name,) = parse_qs(scope["query_string"].decode()).get("model", [body["model"]])
        if name not in (body["model"], *self._of):
            error = {"message": f"{name} does not load", "code": "not_ready"}
            return await JSONResponse({"error": error}, 503)(scope, receive, send)
        await JSONResponse({**body, **self._more, "model": name, **self._of.get(name, {})})(scope, receive, send)
