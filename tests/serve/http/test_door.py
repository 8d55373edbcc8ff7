"""Refusals that are told before there is a task: the same as the gate's, and the connection goes on."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import MutableMapping
from typing import Any

import pytest
from structlog.testing import capture_logs

from latentrt.errors import LatentrtError
from latentrt.serve.core.ticket import QueueFull
from latentrt.serve.http.connection import Refusal, patient
from latentrt.serve.http.door import COURTESY, Door
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.process.records import Records
from tests.serve.http.test_connection import connected
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import FakeService, app_of, live

DRAW = "/v1/images/generations"
KEY = "Authorization: Bearer one"


def request(*headers: str, path: str = DRAW, version: str = "1.1", body: bytes = b"{}") -> bytes:
    lines = [f"POST {path} HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode() + body


def answer(sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the next answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1)
    first, *lines = data.decode().split("\r\n")[:-2]
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = b""
    while len(body) < int(headers["content-length"]):
        body += sock.recv(int(headers["content-length"]) - len(body))
    return int(first.split()[1]), headers, body


def at_the_door(app: Any) -> dict[str, Any]:
    return {"http": patient(PATIENCE, PATIENCE, app.state.door.at_once)}


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (request(), 401, "invalid_api_key"),
        (request(KEY, body=b" " * 2**20), 413, "body_too_large"),
        (request(KEY, "X-Request-Id: mine"), 429, "queue_full"),
        (request(KEY, path="/sdapi/v1/img2img"), 429, "queue_full"),
    ],
    ids=["key", "large", "full", "another"],
)
def test_the_answer_is_what_the_gate_would_say(sent: bytes, status: int, code: str) -> None:
    """And so are the log's line and the metrics."""
    found = []
    for door in (True, False):
        app = app_of(FakeService(queue=4, reserved=4), keys=("one",))
        with (
            capture_logs() as log,
            live(app, **(at_the_door(app) if door else {"http": patient(PATIENCE, PATIENCE)})) as url,
            connected(url) as sock,
        ):
            sock.sendall(sent)
            got = answer(sock)
        found.append((told(got), lines(log), counts(app)))
    assert found[0] == found[1]
    assert (found[0][0][0], found[0][1][0]["outcome"]) == (status, code)


def told(got: tuple[int, dict[str, str], bytes]) -> tuple[int, dict[str, str], bytes]:
    """Without what differs by chance."""
    status, headers, body = got
    assert headers.pop("date")
    if headers["x-request-id"].startswith("req_"):
        del headers["x-request-id"]
    return status, headers, body


def lines(log: list[MutableMapping[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in ("seconds", "id")} for line in log if line["event"] == "request"]


def counts(app: Any) -> list[str]:
    text = app.state.context.metrics.text().decode().splitlines()
    return [line for line in text if "requests_total{" in line or "rejected_total{" in line]


def test_the_connection_goes_on_and_the_body_is_dropped() -> None:
    app = app_of(FakeService(queue=4, reserved=4))
    with live(app, **at_the_door(app)) as url, connected(url) as sock:
        head, body = request(body=b"x" * 999).split(b"\r\n\r\n")
        sock.sendall(head + b"\r\n\r\n" + body[:9])
        assert answer(sock)[0] == 429
        sock.sendall(body[9:])
        for _ in range(2):
            sock.sendall(request())
            assert answer(sock)[0] == 429
        sock.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert answer(sock)[0] == 200


def test_a_connection_whose_body_came_after_the_answer_is_not_kept_for_ever() -> None:
    app = app_of(FakeService(queue=4, reserved=4))
    with live(app, **at_the_door(app), timeout_keep_alive=1) as url, connected(url) as sock:
        sock.sendall(request(body=b"x" * 999)[:-9])
        assert answer(sock)[0] == 429
        sock.sendall(b"x" * 9)
        assert sock.recv(1) == b""


@pytest.mark.parametrize("sent", [request("Connection: close"), request(version="1.0")], ids=["close", "1.0"])
def test_it_is_closed_for_whoever_wants_that(sent: bytes) -> None:
    app = app_of(FakeService(queue=4, reserved=4))
    with live(app, **at_the_door(app)) as url, connected(url) as sock:
        sock.sendall(sent)
        status, headers, _ = answer(sock)
        assert (status, headers["connection"]) == (429, "close")
        assert sock.recv(1) == b""


async def slow(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers after a moment: 200 on /slow, else 418."""
    await asyncio.sleep(1.5 if scope["path"] == "/slow" else 0)
    status = 200 if scope["path"] == "/slow" else 418
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body"})


def refuse(method: str, path: str, *_: Any) -> Refusal | None:
    return Refusal(429, [(b"content-length", b"0")], b"") if path == "/no" else None


def test_one_that_follows_another_waits_for_that_ones_answer() -> None:
    """The application answers it then."""
    with live(slow, http=patient(PATIENCE, PATIENCE, refuse)) as url, connected(url) as sock:
        sock.sendall(request(path="/slow") + request(path="/no"))
        assert [answer(sock)[0] for _ in range(2)] == [200, 418]
        sock.sendall(request(path="/no"))
        assert answer(sock)[0] == 429


def test_a_refusal_does_not_end_what_follows_it_and_one_read_has_one() -> None:
    """Connections idle for a second here; what follows takes longer."""
    with live(slow, http=patient(PATIENCE, PATIENCE, refuse), timeout_keep_alive=1) as url, connected(url) as sock:
        sock.sendall(request(path="/no") * 2 + request(path="/slow"))
        assert [answer(sock)[0] for _ in range(3)] == [429, 418, 200]


def test_nothing_is_begun_for_whoever_is_hung_up_on() -> None:
    with live(slow, http=patient(PATIENCE, PATIENCE, refuse)) as url, connected(url) as sock:
        sock.sendall(request("Connection: keep-alive", path="/no", version="1.0") + request(path="/slow"))
        assert answer(sock)[0] == 429
        assert sock.recv(1) == b""


@pytest.mark.parametrize("line", [b"GET http://h:99999/ HTTP/1.1", b"CONNECT h:443 HTTP/1.1"])
def test_a_request_that_cannot_be_read_is_the_clients_fault(line: bytes, caplog: pytest.LogCaptureFixture) -> None:
    app = app_of(FakeService())
    with live(app, **at_the_door(app)) as url, connected(url) as sock:
        sock.sendall(line + b"\r\nHost: h\r\n\r\n")
        assert sock.recv(99).startswith(b"HTTP/1.1 400")
    assert not any(record.exc_info for record in caplog.records)


def test_a_fault_at_the_door_is_the_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    service = FakeService()
    monkeypatch.setattr(service, "full", lambda ahead=0: 1 / 0)
    app = app_of(service)
    with live(app, **at_the_door(app)) as url, connected(url) as sock:
        sock.sendall(request())
        assert answer(sock)[0] == 500


def test_pages_of_elsewhere_can_read_why() -> None:
    app = app_of(FakeService(queue=4, reserved=4), cors_origin=("https://page.test",))
    with live(app, **at_the_door(app)) as url, connected(url) as sock:
        sock.sendall(request("Origin: https://page.test"))
        status, headers, _ = answer(sock)
    assert (status, headers["access-control-allow-origin"]) == (429, "https://page.test")


# ---- Who is ahead


def door_with(places: int) -> Door:
    """Of a queue that stays empty."""

    def full(ahead: int) -> LatentrtError | None:
        return (
            QueueFull("no place is free", needed="some", fix="try again later", retry_after=1)
            if ahead >= places
            else None
        )

    records = Records(Metrics("emoji"))
    return Door(keys=(), most_bytes=lambda path: 999, full=full, records=records, cross_origin=False)


def ask(door: Door, path: str = DRAW) -> dict[str, Any] | None:
    """The state of a request that goes in; None of one that does not."""
    state: dict[str, Any] = {}
    return state if door.at_once("POST", path, [], state) is None else None


def test_whoever_comes_while_others_go_in_counts_them() -> None:
    async def go() -> None:
        door = door_with(2)
        inside = [ask(door), ask(door)]
        assert None not in inside
        assert ask(door) is None
        assert ask(door, "/v1/models") is not None  # takes no place
        for state in inside:
            assert state is not None
            await door.enter(state)
            await door.enter(state)  # once is enough
        assert [ask(door) is None for _ in range(3)] == [False, False, True]

    asyncio.run(go())


def test_they_go_in_when_nobody_comes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentrt.serve.http.door.COURTESY", PATIENCE)

    async def go() -> None:
        door = door_with(1)
        state = ask(door)
        assert state is not None
        entering = asyncio.ensure_future(door.enter(state))
        for _ in range(20):
            await asyncio.sleep(0)
            assert ask(door) is None
            assert not entering.done()
        await asyncio.wait_for(entering, PATIENCE)
        assert ask(door) is not None

    asyncio.run(go())


@pytest.mark.parametrize("give_up", [False, True])
def test_nor_do_they_wait_for_ever_or_count_when_they_are_given_up(give_up: bool) -> None:
    async def go() -> None:
        door, began = door_with(1), time.monotonic()
        state = ask(door)
        assert state is not None
        entering = asyncio.ensure_future(door.enter(state))
        while not entering.done():
            assert ask(door) is None
            await asyncio.sleep(0)
            if give_up:
                entering.cancel()
        assert entering.cancelled() is give_up
        assert give_up or time.monotonic() - began >= COURTESY
        assert ask(door) is not None

    asyncio.run(go())
