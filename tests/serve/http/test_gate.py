"""What every request passes: ids, keys, bounds of the body, the log line; and clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import tempfile
import threading
from collections.abc import Iterator, MutableMapping
from functools import partial
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from latentrt.serve.http import door
from latentrt.serve.process import logs
from tests.support.serve.fakes import FakeService, app_of, live, png, until

DRAW = "/v1/images/generations"


def ask(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.request(method, path, **content)

    return asyncio.run(go())


@pytest.fixture
def app() -> Any:
    return app_of(FakeService())


@pytest.fixture
def log() -> Iterator[list[MutableMapping[str, Any]]]:
    with capture_logs() as lines:
        yield lines


def lines_of(log: list[MutableMapping[str, Any]]) -> list[MutableMapping[str, Any]]:
    return [line for line in log if line["event"] == "request"]


# ---- Ids


def test_a_request_id_is_echoed(app: Any) -> None:
    assert ask(app, "GET", "/v1/models", headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"


@pytest.mark.parametrize("bad", ["", "a b", "x" * 129, "\x7f"])
def test_an_id_that_a_log_cannot_hold_is_replaced(app: Any, bad: str) -> None:
    made = [ask(app, "GET", "/v1/models", headers={"x-request-id": bad}).headers["x-request-id"] for _ in range(2)]
    assert all(one.startswith("req_") for one in made)
    assert made[0] != made[1]


def test_refusals_and_unknown_paths_have_an_id_too(app: Any) -> None:
    for method, path in (("GET", "/nothing"), ("DELETE", "/v1/models"), ("POST", DRAW)):
        assert ask(app, method, path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


# ---- Keys


@pytest.fixture
def locked() -> Any:
    return app_of(FakeService(), keys=("one", "two"))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer three", "Bearer oneone", "one", "Basic b25l!", "Bearer é"]
)
def test_without_a_right_key_nothing_is_told(locked: Any, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/models", "/latentrt/queue", "/sdapi/v1/options", "/nothing"):
        answer = ask(locked, "GET", path, headers=headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize("header", ["Bearer one", "bearer two", "Basic b25l", "Basic dXNlcjp0d28="])
def test_any_of_the_keys_opens(locked: Any, header: str) -> None:
    assert ask(locked, "GET", "/v1/models", headers={"authorization": header}).status_code == 200


@pytest.mark.parametrize("path", ["/health/live", "/health/ready", "/metrics", "/openapi.json"])
def test_operations_need_no_key(locked: Any, path: str) -> None:
    assert ask(locked, "GET", path).status_code == 200


def test_every_key_is_compared_whichever_was_sent(locked: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []

    def compare(key: bytes, sent: bytes) -> bool:
        compared.append(key)
        return hmac.compare_digest(key, sent)

    monkeypatch.setattr(door, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    for sent in ("one", "two", "three"):
        ask(locked, "GET", "/v1/models", headers={"authorization": f"Bearer {sent}"})
    assert compared == [b"one", b"two"] * 3


# ---- Browsers


ASKING = {"origin": "https://a.example", "access-control-request-method": "POST"}


def test_pages_of_named_origins_may_ask_with_a_key_and_read_every_answer() -> None:
    app = app_of(FakeService(), keys=("one",), cors_origin=("https://a.example", "http://localhost:3000"))
    asked = {**ASKING, "access-control-request-headers": "authorization,content-type,x-stainless-lang"}
    leave = ask(app, "OPTIONS", DRAW, headers=asked)
    assert leave.status_code == 200
    assert leave.headers["access-control-allow-origin"] == "https://a.example"
    assert leave.headers["access-control-allow-headers"] == asked["access-control-request-headers"]
    assert "POST" in leave.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in leave.headers
    for key, status in (("one", 200), ("two", 401)):
        headers = {"origin": "https://a.example", "authorization": f"Bearer {key}"}
        answer = ask(app, "GET", "/v1/models", headers=headers)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "https://a.example")
        assert "x-request-id" in answer.headers["access-control-expose-headers"]


def test_pages_of_other_origins_may_not() -> None:
    for app in (app_of(FakeService()), app_of(FakeService(), cors_origin=("https://b.example",))):
        for method, path in (("OPTIONS", DRAW), ("GET", "/v1/models")):
            answer = ask(app, method, path, headers=ASKING)
            assert "access-control-allow-origin" not in answer.headers
            assert answer.status_code in ({"OPTIONS": (400, 405), "GET": (200,)}[method])


def test_nothing_is_fetched_from_elsewhere(app: Any) -> None:
    for path in ("/docs", "/redoc"):
        assert ask(app, "GET", path).status_code == 404
    assert ask(app, "GET", "/openapi.json").json()["paths"]


# ---- Bodies


def answer_unread(app: Any, headers: dict[str, str], path: str = DRAW) -> tuple[int, dict[str, Any]]:
    """The answer to a POST whose body must not be read."""
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("the body was read")

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path},
        **{"raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http"},
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


def test_a_body_that_is_too_large_is_refused_unread(app: Any) -> None:
    status, body = answer_unread(app, {"content-type": "application/json", "content-length": "99999999999"})
    assert (status, body["error"]["code"]) == (413, "body_too_large")


def test_only_where_pictures_are_sent_a_body_may_be_large() -> None:
    app = app_of(FakeService(), max_prompt=100)
    least = len(json.dumps({"prompt": "\U0001f34e" * 100, "negative_prompt": "\U0001f34e" * 100}))

    async def chunks() -> Any:
        yield b" " * 2**20

    for path, kind, status in (
        (DRAW, "application/json", 413),
        ("/sdapi/v1/txt2img", "application/json", 413),
        ("/v1/images/edits", "multipart/form-data; boundary=x", 400),
        ("/sdapi/v1/img2img", "application/json", 400),
    ):
        for body in (b" " * 2**20, chunks()):
            assert ask(app, "POST", path, content=body, headers={"content-type": kind}).status_code == status
    assert least < app.state.context.settings.max_text < 2**17


def test_a_body_of_another_type_is_refused_unread(app: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        status, body = answer_unread(app, {"content-type": kind, "content-length": "9"})
        assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_without_a_right_key_is_refused_unread(locked: Any) -> None:
    assert answer_unread(locked, {"content-type": "application/json", "content-length": "9"})[0] == 401


def test_a_body_that_does_not_say_its_size_is_counted() -> None:
    app = app_of(FakeService(), max_body=1000)

    async def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(11):
            yield b" " * 100

    for path, kind in ((DRAW, "application/json"), ("/v1/images/edits", "multipart/form-data; boundary=x")):
        answer = ask(app, "POST", path, content=chunks(), headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    "path", ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"]
)
def test_where_nobody_can_have_a_place_nothing_is_read(log: list[MutableMapping[str, Any]], path: str) -> None:
    """The answer is the one that a reader of the whole request would give."""
    service = FakeService(queue=4, reserved=4)
    app = app_of(service, keys=("one",))
    key = {"authorization": "Bearer one"}
    status, body = answer_unread(app, {**key, "content-length": "9"}, path)
    assert (status, body["error"]["code"]) == (429, "queue_full")
    assert answer_unread(app, {"content-length": "9"}, path)[0] == 401
    line, wrong = lines_of(log)
    assert (line["status"], line["outcome"], line["route"]) == (429, "queue_full", path)
    assert (wrong["status"], wrong["route"]) == (401, path)
    assert (
        'request_rejected_total{model_name="emoji",reason="queue_full"} 1.0'
        in app.state.context.metrics.text().decode()
    )
    service.queue = 5
    readable = {**key, "content-type": "application/json", "content-length": "9"}
    assert answer_unread(app, readable)[0] == 400  # for want of a body


def test_whoever_is_not_drawn_for_is_answered_by_a_full_server_too() -> None:
    app = app_of(FakeService(queue=4, reserved=4))
    assert [ask(app, "GET", path).status_code for path in ("/v1/models", "/latentrt/queue", "/health/ready")] == [
        200
    ] * 3


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'"a"', b"\xff", b'{"prompt": NaN}', b'{"prompt":"\\ud800"}', b"[" * 99999]
)
def test_malformed_bodies_are_the_clients_fault(app: Any, body: bytes) -> None:
    answer = ask(app, "POST", DRAW, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


@pytest.mark.parametrize(
    "body", [b"", b"--x", b"zzz", b"--x\r\n\r\n\r\n--x--", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--"]
)
def test_malformed_forms_are_the_clients_fault(app: Any, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
        answer = ask(app, "POST", "/v1/images/edits", content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_value")


def test_a_body_that_dawdles_is_given_up() -> None:
    with live(app_of(FakeService(), body_timeout=0.05)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "Host: x\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
            connection.sendall(f"POST {DRAW} HTTP/1.1\r\n{head}{{".encode())
            with connection.makefile("rb") as answers:
                answer = answers.readline() + answers.read()
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"body_timeout" in answer


# ---- Uploads of more than a MiB go through a file

LARGE = {"image": ("a.png", b"x" * 2**21)}


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")])
def test_an_upload_that_cannot_be_kept_is_refused_and_logged(
    app: Any, fault: OSError, log: list[MutableMapping[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise fault

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    answer = ask(app, "POST", "/v1/images/edits", data={"prompt": "a"}, files=LARGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_storage")
    assert "temporary folder" in answer.json()["error"]["message"]
    (error,) = (line for line in log if line["log_level"] == "error")
    assert error["exc_info"].__cause__ is fault
    assert error["id"] == answer.headers["x-request-id"]
    (line,) = lines_of(log)
    assert (line["status"], line["outcome"]) == (503, "insufficient_storage")
    small = {"image": ("a.png", png())}
    assert ask(app, "POST", "/v1/images/edits", data={"prompt": "a"}, files=small).status_code == 200


def test_without_any_temporary_folder_it_is_the_same(app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    answer = ask(app, "POST", "/v1/images/edits", data={"prompt": "a"}, files=LARGE)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "insufficient_storage")


# ---- What goes wrong inside


def test_a_fault_is_a_500_without_its_details(log: list[MutableMapping[str, Any]]) -> None:
    app = app_of(FakeService(refuse=ZeroDivisionError("secret")))  # type: ignore[arg-type]
    answer = ask(app, "POST", DRAW, json={"prompt": "a"}, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "engine_error")
    assert answer.json()["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"] == "mine"
    assert lines_of(log)[0]["outcome"] == "engine_error"


# ---- Clients that leave


@pytest.fixture
def held() -> FakeService:
    return FakeService(hold=asyncio.Event())


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"prompt": "a", "stream": True}], ids=["plain", "stream"])
def test_a_client_that_leaves_lets_go_of_its_pictures(
    held: FakeService, body: dict[str, Any], log: list[MutableMapping[str, Any]]
) -> None:
    app = app_of(held)
    board = app.state.context.board
    with live(app) as url:
        with pytest.raises(httpx.ReadTimeout), httpx.stream("POST", f"{url}{DRAW}", json=body, timeout=0.1) as answer:
            answer.read()
        asyncio.run(until(lambda: not list(board) and lines_of(log)))
    assert len(held.cancelled) == 1
    assert (held.reserved, held.running) == (0, 0)
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
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 99\r\n\r\n"
            sock.sendall((head + begun).encode())
        asyncio.run(until(lambda: lines_of(log)))
    (line,) = lines_of(log)
    assert (line["status"], line["outcome"]) == (499, "client_gone")


def test_one_that_leaves_takes_nobody_along(held: FakeService) -> None:
    app = app_of(held)
    board = app.state.context.board
    with live(app) as url:
        answers: list[int] = []
        stays = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}{DRAW}", json={"prompt": "b"}).status_code)
        )
        stays.start()
        asyncio.run(until(lambda: list(board)))
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}{DRAW}", json={"prompt": "a"}, timeout=0.1)
        asyncio.run(until(lambda: len(list(board)) == 1))
        release(held)
        stays.join()
    assert answers == [200]
    assert len(held.cancelled) == 1


def release(service: FakeService) -> None:
    assert service.hold is not None
    task = next(iter(service.tasks))
    task.get_loop().call_soon_threadsafe(service.hold.set)


# ---- The log


def test_a_few_lines_are_written_at_once_and_those_of_a_crowd_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LATER", 0.2)
    lines, written, most = logs.Lines(), list[int](), 3 * logs.FEW

    async def crowd(numbers: range) -> None:
        for number in numbers:
            lines.add(partial(written.append, number))

    async def two_crowds() -> None:
        await crowd(range(most))
        assert len(written) == logs.FEW
        await until(lambda: len(written) == most)
        await asyncio.sleep(0.3)
        await crowd(range(most, most + 1))
        assert len(written) == most + 1

    asyncio.run(two_crowds())
    assert written == [*range(most + 1)]


def test_a_request_is_one_line(log: list[MutableMapping[str, Any]]) -> None:
    body = {"prompt": "a secret", "n": 2, "num_inference_steps": 9, "scheduler": "heun"}
    ask(app_of(FakeService()), "POST", DRAW, json=body, headers={"x-request-id": "mine"})
    (line,) = lines_of(log)
    seconds, waited = line.pop("seconds"), line.pop("queue_seconds")
    assert 0 < waited < seconds
    assert line == {
        **{"event": "request", "log_level": "info", "id": "mine", "method": "POST", "route": DRAW, "status": 200},
        **{"outcome": "ok", "n": 2, "done": 2, "steps": 9, "rows": 17, "solver": "heun", "size": "128x128"},
    }


def test_prompts_are_logged_only_if_that_is_asked_for(log: list[MutableMapping[str, Any]]) -> None:
    ask(app_of(FakeService(), log_prompts=True), "POST", DRAW, json={"prompt": "a secret"})
    assert lines_of(log)[0]["prompt"] == "a secret"


def test_health_is_not_worth_a_line(app: Any, log: list[MutableMapping[str, Any]]) -> None:
    ask(app, "GET", "/health/live")
    assert {line["log_level"] for line in lines_of(log)} == {"debug"}
