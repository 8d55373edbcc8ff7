"""Clients that take their answer slowly: one that takes too little is given up, one that takes enough is not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from latentrt.serve.http.generation import Context
from latentrt.serve.http.guard.middleware import PIECE, Guard
from latentrt.serve.http.guard.record import Record
from latentrt.serve.http.models.models import Models
from latentrt.serve.process.config import Settings
from latentrt.serve.process.metrics import Metrics
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import FakeScheduler, catalog_of, live, until

EVENT = b"x" * (4 * PIECE)  # more than the kernel keeps for a client
STALL = 0.5


class App:
    """Sends so many events, the last one with the answer's end."""

    def __init__(self, events: int) -> None:
        self.events, self.sent = events, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1, self.events + 1):
            await send({"type": "http.response.body", "body": EVENT, "more_body": number < self.events})
            self.sent = number


@contextmanager
def asked(app: App, stall: float, room: int = 4096) -> Iterator[socket.socket]:
    """A client of it that has asked, with so much room for what it does not read."""
    settings = Settings(stall_timeout=stall)
    catalog, metrics = catalog_of(), Metrics("emoji")
    models = Models.of(Context(FakeScheduler(), settings, catalog, metrics))
    guard = Guard(app, keys=(), settings=settings, models=models, record=Record(metrics, None))
    with live(guard, http="h11") as url, socket.socket() as sock:
        host, _, port = url.removeprefix("http://").rpartition(":")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        sock.settimeout(PATIENCE)
        sock.connect((host, int(port)))
        sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        yield sock


def outcome(log: list[MutableMapping[str, Any]]) -> tuple[int, str]:
    """How the request ended, as soon as it has."""
    asyncio.run(until(lambda: bool(log)))
    return log[0]["status"], log[0]["outcome"]


def drained(sock: socket.socket, *, pause: float = 0.0) -> int:
    """How many bytes came until the answer's end or the connection's."""
    total = 0
    with suppress(ConnectionError):
        while data := sock.recv(2**17):
            total += len(data)
            if data.endswith(b"0\r\n\r\n"):
                break
            time.sleep(pause)
    return total


@pytest.mark.parametrize("events", [1, 3], ids=["one piece", "a stream"])
def test_a_client_that_takes_nothing_is_given_up(events: int, log: list[MutableMapping[str, Any]]) -> None:
    """What the kernel and uvicorn took over by then still comes; then the connection ends."""
    app = App(events)
    with asked(app, STALL) as sock:
        assert outcome(log) == (499, "client_gone")
        assert app.sent == 0
        assert drained(sock) < len(EVENT)


def test_a_client_that_takes_a_byte_now_and_then_is_given_up(log: list[MutableMapping[str, Any]]) -> None:
    app = App(3)
    with asked(app, STALL) as sock:
        while not log:
            assert sock.recv(1)
            time.sleep(0.01)
        assert outcome(log) == (499, "client_gone")


@pytest.mark.parametrize("events", [1, 3], ids=["one piece", "a stream"])
def test_a_client_that_takes_a_mebibyte_in_time_may_be_slow(events: int, log: list[MutableMapping[str, Any]]) -> None:
    app = App(events)
    with asked(app, PATIENCE, 2**20) as sock:
        assert drained(sock, pause=0.01) > events * len(EVENT)
        assert outcome(log) == (200, "ok")
    assert app.sent == events
