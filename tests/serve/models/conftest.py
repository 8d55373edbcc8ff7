"""Servers of several fake models, whose loads a test controls."""

from __future__ import annotations

import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import httpx
import pytest
from fastapi import FastAPI

from latentrt.engine import Engine
from latentrt.errors import BundleError
from latentrt.serve import server
from latentrt.serve.http.models import share
from latentrt.serve.http.models.entry import Entry
from latentrt.serve.http.models.models import Models
from latentrt.serve.process.config import MIB, Settings
from tests.support.serve.fake_engine import PATIENCE, Fakes, fake_engine, handle_of
from tests.support.serve.fakes import live

T = TypeVar("T")
DRAW = "/v1/images/generations"


class Several:
    """A server of fake models.

    Attributes:
        fakes: the networks of each, by name.
        loads: how often each was loaded, or was to be.
        may_load: the events that loads wait for; set unless a test clears them.
        broken: models that cannot be loaded.
        loaded: those that are.
        engine: the last one that was loaded, while anything holds it.
    """

    def __init__(self, *names: str) -> None:
        self.fakes = {name: Fakes() for name in names}
        self.loads = Counter[str]()
        self.may_load = {name: threading.Event() for name in names}
        for event in self.may_load.values():
            event.set()
        self.broken: set[str] = set()
        self.loaded: set[str] = set()
        self.engine: Callable[[], Engine | None] = lambda: None
        self.app = FastAPI()
        self.url = ""
        self._clients = ThreadPoolExecutor(32)

    @property
    def models(self) -> Models:
        found: Models = self.app.state.models
        return found

    def entry(self, name: str) -> Entry:
        return self.models.find(name)

    @contextmanager
    def load(self, settings: Settings) -> Iterator[Engine]:
        name = str(settings.model_name)
        self.loads[name] += 1
        assert self.may_load[name].wait(PATIENCE)
        if name in self.broken:
            raise BundleError("the bundle is damaged", needed="a whole one")
        with fake_engine(self.fakes[name]) as engine:
            self.loaded.add(name)
            self.engine = weakref.ref(engine)
            yield engine
        self.loaded.remove(name)

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}{path}", timeout=PATIENCE, **more)

    def draw(self, model: str | None = None, *, key: str = "", **body: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        asked = {"prompt": "an owl", "num_inference_steps": 3, "seed": 5, "model": model, **body}
        return self.ask("POST", DRAW, json=asked, headers=headers)

    def drawing(self, model: str | None = None, **body: Any) -> Future[httpx.Response]:
        """Draw in a thread."""
        return self._clients.submit(self.draw, model, **body)

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something in a thread."""
        return self._clients.submit(work)

    @contextmanager
    def waiting(self, model: str) -> Iterator[None]:
        """Let a request have a place at a model, but nothing to do: its client still sends."""
        scheduler, handle = self.entry(model).scheduler, handle_of()
        assert scheduler is not None
        scheduler.reserve(handle)
        yield
        scheduler.release(handle)

    def ready(self) -> dict[str, str]:
        """Return the state of each model."""
        found: dict[str, str] = self.ask("GET", "/health/ready").json()["models"]
        return found

    def until(self, check: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not check():
            assert time.monotonic() < end, "it never came"
            time.sleep(0.005)

    def let_go(self) -> None:
        """Let everything end that waits."""
        for event in self.may_load.values():
            event.set()
        for fakes in self.fakes.values():
            fakes.allow(None)
            fakes.decoding.set()


Serve = Callable[..., Several]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers of fake models "a", "b" and so on, with settings of their `own`; each model has 100 MiB."""
    monkeypatch.setattr(share, "bytes_of", lambda settings: 100 * MIB)
    monkeypatch.setattr(server, "guess_of", lambda settings: 100 * MIB)
    monkeypatch.setattr(Entry, "measure", lambda entry, before: None)
    monkeypatch.setattr(server, "measured", lambda engine: {})
    with ExitStack() as stack:

        def start(*names: str, own: Mapping[str, Any] | None = None, **settings: Any) -> Several:
            made = Several(*names)
            monkeypatch.setattr(server, "loaded", made.load)
            tables = {name: {"bundle": "emoji", **(own or {}).get(name, {})} for name in names}
            made.app = stack.enter_context(
                server.assembled(Settings(models=tables, edits=False, log_format="json", **settings))
            )
            made.url = stack.enter_context(live(made.app, lifespan="on"))
            stack.callback(made.let_go)
            made.until(lambda: made.models.state == "ready")
            return made

        yield start
