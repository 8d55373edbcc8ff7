"""How requests end: faults, clients that leave, and the line that the log has of each."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest

from latentrt.serve.http.guard import record
from tests.serve.http.test_middleware import DRAW, ask, lines_of
from tests.support.serve.fakes import FakeScheduler, app_of, live, post, until

# ---- What goes wrong inside


def test_a_fault_is_a_500_without_its_details(log: list[MutableMapping[str, Any]]) -> None:
    app = app_of(FakeScheduler(refuses=ZeroDivisionError("secret")))  # type: ignore[arg-type]
    answer = ask(app, "POST", DRAW, json={"prompt": "a"}, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert lines_of(log)[0]["outcome"] == "engine_error"


# ---- Clients that leave


@pytest.fixture
def held() -> FakeScheduler:
    return FakeScheduler(hold=asyncio.Event())


def come_and_leave(url: str, scheduler: FakeScheduler, body: dict[str, Any]) -> None:
    """Ask for pictures, and hang up once they are drawn."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    data, known = json.dumps(body).encode(), len(scheduler.submitted)
    head = f"POST {DRAW} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with socket.create_connection((host, int(port))) as sock:
        sock.sendall(head.encode() + data)
        asyncio.run(until(lambda: len(scheduler.submitted) > known))


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"prompt": "a", "stream": True}], ids=["plain", "stream"])
def test_a_client_that_leaves_lets_go_of_its_pictures(
    held: FakeScheduler, body: dict[str, Any], log: list[MutableMapping[str, Any]]
) -> None:
    with live(app_of(held)) as url:
        come_and_leave(url, held, body)
        asyncio.run(until(lambda: not held.handles and lines_of(log)))
    assert held.cancelled == held.submitted
    assert (held.waiting, held.running) == (0, 0)
    (line,) = lines_of(log)
    assert (line["outcome"], line["n"], line["done"]) == ("client_gone", 1, 0)


@pytest.mark.parametrize(
    ("path", "kind", "begun"),
    [
        (DRAW, "application/json", '{"prompt": '),
        ("/v1/images/edits", "multipart/form-data; boundary=x", "--x\r\nContent-Disposition: "),
    ],
    ids=["json", "form"],
)
def test_one_that_leaves_before_its_body_came_sent_nothing_wrong(
    app: Any, log: list[MutableMapping[str, Any]], path: str, kind: str, begun: str
) -> None:
    with live(app) as url:
        host, _, port = url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as sock:
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\n"
            sock.sendall((head + begun).encode())
        asyncio.run(until(lambda: lines_of(log)))
    (line,) = lines_of(log)
    assert (line["status"], line["outcome"]) == (499, "client_gone")


def test_one_that_leaves_takes_no_other_along(held: FakeScheduler) -> None:
    app = app_of(held)
    with live(app) as url:
        answers: list[int] = []
        stays = threading.Thread(target=lambda: answers.append(post(f"{url}{DRAW}", json={"prompt": "b"}).status_code))
        stays.start()
        asyncio.run(until(lambda: held.handles))
        come_and_leave(url, held, {"prompt": "a"})
        asyncio.run(until(lambda: len(held.handles) == 1))
        release(held)
        stays.join()
    assert answers == [200]
    assert len(held.cancelled) == 1


def release(scheduler: FakeScheduler) -> None:
    assert scheduler.hold is not None
    task = next(iter(scheduler.tasks.values()))
    task.get_loop().call_soon_threadsafe(scheduler.hold.set)


# ---- The log


def test_a_request_is_one_line(log: list[MutableMapping[str, Any]]) -> None:
    body = {"prompt": "a secret", "n": 2, "num_inference_steps": 9, "scheduler": "heun"}
    ask(app_of(FakeScheduler()), "POST", DRAW, json=body, headers={"x-request-id": "mine"})
    (line,) = lines_of(log)
    seconds, waited = line.pop("seconds"), line.pop("queue_seconds")
    assert 0 < waited < seconds
    assert line.pop("client").startswith("address-")
    assert line == {
        **{"event": "request", "log_level": "info", "id": "mine", "method": "POST", "route": DRAW, "status": 200},
        **{"outcome": "ok", "n": 2, "done": 2, "steps": 9, "rows": 17, "solver": "heun", "size": "128x128"},
    }


def test_prompts_are_logged_only_if_that_is_asked_for(log: list[MutableMapping[str, Any]]) -> None:
    ask(app_of(FakeScheduler(), log_prompts=True), "POST", DRAW, json={"prompt": "a secret"})
    assert lines_of(log)[0]["prompt"] == "a secret"


def test_what_is_asked_all_the_time_is_not_worth_a_line(app: Any, log: list[MutableMapping[str, Any]]) -> None:
    paths = ("/health/live", "/latentrt/queue", "/sdapi/v1/progress", "/static/app.js", "/static/none.js")
    statuses = [ask(app, "GET", path).status_code for path in paths]
    assert statuses == [200, 200, 200, 200, 404]
    assert [line["route"] for line in lines_of(log)] == [*paths[:3], "/static", "/static"]
    assert {line["log_level"] for line in lines_of(log)} == {"debug"}
    text = asyncio.run(app.state.metrics.text()).decode()
    assert 'requests_total{model_name="emoji",outcome="ok",route="/static"} 1.0' in text


def test_refusals_of_a_kind_are_counted_by_the_second(
    log: list[MutableMapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "SECOND", 0.5)
    app = app_of(FakeScheduler().fill())

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for _ in range(6):
                await client.post(DRAW, json={"prompt": "a"})
            await until(lambda: [line for line in log if line["event"] == "refusals"])
            await client.post(DRAW, json={"prompt": "a"})

    asyncio.run(go())
    told = [(line["outcome"], line.get("count")) for line in log if line["log_level"] == "info"]
    assert told == [("queue_full", None), ("queue_full", 5), ("queue_full", None)]
    assert len(lines_of(log)) == 7  # each is there at the level debug
