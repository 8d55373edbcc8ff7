"""Connections whose clients are slow: whoever takes too little of an answer is hung up on, whoever takes it is not."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from latentrt.serve.http.connection import _Joining, patient
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import live

EVENT = b"x" * 2**22  # more than the kernel keeps for a client
STALL = 0.5


class App:
    """Sends so many events, and notes how the client's leaving looks from here."""

    def __init__(self, events: int, *, more: bool = True) -> None:
        self.events, self.more = events, more
        self.sent, self.gone = 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await receive()
        leaving = asyncio.ensure_future(self._leaving(receive))
        sending = asyncio.ensure_future(self._answer(send))
        await asyncio.wait({leaving, sending}, return_when=asyncio.FIRST_COMPLETED)
        for task in (leaving, sending):
            task.cancel()

    async def _leaving(self, receive: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.gone = True

    async def _answer(self, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(1, self.events + 1):
            more = self.more or number < self.events
            await send({"type": "http.response.body", "body": EVENT, "more_body": more})
            self.sent = number
        if self.more:
            await send({"type": "http.response.body"})


@contextmanager
def connected(url: str, room: int = 4096) -> Iterator[socket.socket]:
    """A client with so much room for what it does not read."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        sock.settimeout(PATIENCE)
        sock.connect((host, int(port)))
        yield sock


@contextmanager
def reader(url: str, room: int = 4096) -> Iterator[socket.socket]:
    """One that has asked."""
    with connected(url, room) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        yield sock


def dribble(sock: socket.socket, piece: bytes, pause: float) -> None:
    """Send a piece again and again, until there is nobody to send it to."""
    with suppress(ConnectionError):
        while True:
            sock.sendall(piece)
            time.sleep(pause)


@pytest.mark.parametrize("before", [b"", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["first", "second"])
def test_a_head_that_does_not_come_is_not_awaited_for_ever(before: bytes) -> None:
    with live(App(0), http=patient(STALL, PATIENCE)) as url, connected(url) as sock:
        sock.sendall(before)
        assert not before or sock.recv(99).startswith(b"HTTP/1.1 200")
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        dribble(sock, b"x", STALL / 10)


def test_whoever_connects_must_say_something() -> None:
    with live(App(0), http=patient(STALL, PATIENCE)) as url, connected(url) as sock:
        assert drained(sock) == 0


def test_a_head_without_end_is_not_kept() -> None:
    with live(App(0), http=patient(PATIENCE, PATIENCE)) as url, connected(url) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nA: ")
        dribble(sock, b"x" * 2**14, 0)


def test_a_body_may_take_longer_than_a_head() -> None:
    app = App(0)
    with live(app, http=patient(STALL, PATIENCE)) as url, connected(url) as sock:
        sock.sendall(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999\r\n\r\n")
        time.sleep(2 * STALL)
        sock.sendall(b"x" * 99999)
        assert sock.recv(99).startswith(b"HTTP/1.1 200")


def drained(sock: socket.socket, *, most: int = 2**20, pause: float = 0.0) -> int:
    """How many bytes came until the server hung up, or the answer's end: so many at a time, with pauses between."""
    total = 0
    with suppress(ConnectionError):
        while data := sock.recv(most):
            total += len(data)
            if data.endswith(b"0\r\n\r\n"):
                break
            time.sleep(pause)
    return total


def test_a_client_that_takes_a_byte_now_and_then_is_hung_up_on() -> None:
    app = App(3)
    with live(app, http=patient(PATIENCE, STALL)) as url, reader(url) as sock:
        while not app.gone:
            assert sock.recv(1)
            time.sleep(0.01)
        assert drained(sock) < len(EVENT)  # what the kernel had taken over by then


def test_what_is_sent_in_one_piece_is_not_kept_for_ever_either() -> None:
    """The application has long forgotten it then."""
    app = App(1, more=False)
    with live(app, http=patient(PATIENCE, STALL)) as url, reader(url) as sock:
        assert sock.recv(1)
        time.sleep(3 * STALL)
        assert drained(sock) < len(EVENT)


def test_a_client_that_takes_a_mebibyte_in_time_may_be_slow() -> None:
    app = App(3)
    with live(app, http=patient(PATIENCE, STALL)) as url, reader(url, 2**20) as sock:
        began = time.monotonic()
        assert drained(sock, most=2**17, pause=0.01) > app.events * len(EVENT)
        assert time.monotonic() - began > STALL
    assert app.sent == app.events


class Sink:
    """A transport that notes what is sent at once, and what is done besides."""

    def __init__(self) -> None:
        self.done: list[bytes | str] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("close")

    def is_closing(self) -> bool:
        return "close" in self.done


def test_the_head_of_an_answer_is_sent_with_what_follows_in_the_same_turn() -> None:
    async def go() -> list[bytes | str]:
        sink: Any = Sink()
        transport = _Joining(sink)
        transport.write(b"head")
        transport.write(b"body")
        transport.write(b"an event")
        assert sink.done == [b"headbody"]
        await asyncio.sleep(0)
        transport.write(b"x" * 2**20)
        transport.write(b"last")
        assert not transport.is_closing()
        transport.close()
        await asyncio.sleep(0)
        return sink.done

    assert asyncio.run(go()) == [b"headbody", b"an event", b"x" * 2**20, b"last", "close"]
