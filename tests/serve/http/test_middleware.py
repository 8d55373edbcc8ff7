"""What every request passes: ids, keys, bounds of the body, the log line; and clients that leave."""

from __future__ import annotations

import asyncio
import hmac
import json
import socket
import tempfile
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest

from latentrt.serve.process import keys
from tests.support.serve.fakes import FakeScheduler, app_of, code_of, live, png

DRAW = "/v1/images/generations"


def ask(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **content)

    return asyncio.run(go())


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


def test_behind_ray_the_id_is_left_to_its_proxy() -> None:
    assert "x-request-id" not in ask(app_of(FakeScheduler(), ray=True), "GET", "/v1/models").headers


def test_refusals_and_unknown_paths_have_an_id_too(app: Any) -> None:
    for method, path in (("GET", "/nothing"), ("DELETE", "/v1/models"), ("POST", DRAW)):
        assert ask(app, method, path, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"


# ---- Keys


@pytest.fixture
def locked() -> Any:
    return app_of(FakeScheduler(), keys=("one", "two"))


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer three", "Bearer oneone", "one", "Basic b25l!", "Bearer é"]
)
def test_without_a_right_key_nothing_is_told(locked: Any, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode()}
    for path in ("/v1/models", "/latentrt/queue", "/sdapi/v1/options", "/nothing"):
        answer = ask(locked, "GET", path, headers=headers)
        assert (answer.status_code, code_of(answer.json())) == (401, "invalid_api_key")
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

    monkeypatch.setattr(keys, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    for sent in ("one", "two", "three"):
        ask(locked, "GET", "/v1/models", headers={"authorization": f"Bearer {sent}"})
    assert compared == [b"one", b"two"] * 3


# ---- Browsers


ASKING = {"origin": "https://a.example", "access-control-request-method": "POST"}


def test_pages_of_named_origins_may_ask_with_a_key_and_read_every_answer() -> None:
    app = app_of(FakeScheduler(), keys=("one",), cors_origin=("https://a.example", "http://localhost:3000"))
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
    for app in (app_of(FakeScheduler()), app_of(FakeScheduler(), cors_origin=("https://b.example",))):
        for method, path in (("OPTIONS", DRAW), ("GET", "/v1/models")):
            answer = ask(app, method, path, headers=ASKING)
            assert "access-control-allow-origin" not in answer.headers
            assert answer.status_code in ({"OPTIONS": (400, 405), "GET": (200,)}[method])


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),  # no browser
        ({"origin": "http://localhost"}, 200),
        ({"origin": "https://localhost"}, 200),  # a proxy speaks TLS
        ({"origin": "http://localhost:3000"}, 403),
        ({"origin": "https://a.example"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": "https://own.example", "sec-fetch-site": "same-origin"}, 200),  # a proxy changed the host
        ({"origin": "chrome-extension://abc", "sec-fetch-site": "none"}, 200),
        ({"origin": "http://localhost", "sec-fetch-site": "same-site"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"origin": "https://b.example", "sec-fetch-site": "cross-site"}, 200),  # named
    ],
)
def test_a_server_without_keys_takes_orders_from_its_own_pages(headers: dict[str, str], status: int) -> None:
    app = app_of(FakeScheduler(), cors_origin=("https://b.example",))
    for path in ("/sdapi/v1/interrupt", "/sdapi/v1/options"):
        answer = ask(app, "POST", path, headers=headers, json={})
        assert answer.status_code == status
        assert status == 200 or code_of(answer.json()) == "origin_not_allowed"
    assert ask(app, "GET", "/", headers=headers).status_code == 200  # links to it work
    keyed = ask(app_of(FakeScheduler(), keys=("one",)), "POST", "/sdapi/v1/interrupt", headers=headers)
    assert keyed.status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost:8000", 200),
        ("127.0.0.1", 200),
        ("[::1]:8000", 200),
        ("192.168.0.7", 200),
        ("a.localhost", 200),
        ("a.example", 403),
        ("localhost.a.example", 403),
        ("127.0.0.1.a.example", 403),
        ("[", 403),
        ("Named.example:80", 200),
    ],
)
def test_names_that_a_page_may_have_given_to_this_address_are_refused(host: str, status: int) -> None:
    app = app_of(FakeScheduler(), allowed_host=("named.example",))
    answer = ask(app, "GET", "/sdapi/v1/progress", headers={"host": host})
    assert answer.status_code == status
    assert status == 200 or code_of(answer.json()) == "host_not_allowed"
    for open_to_all in ({"host": "0.0.0.0"}, {"allowed_host": ("*",)}, {"keys": ("one",)}):
        other = app_of(FakeScheduler(), **open_to_all)
        own = {"host": host, "authorization": "Bearer one"}
        assert ask(other, "GET", "/sdapi/v1/progress", headers=own).status_code == 200


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
    assert (status, code_of(body)) == (413, "body_too_large")


def test_only_where_pictures_are_sent_a_body_may_be_large() -> None:
    app = app_of(FakeScheduler(), max_prompt=100)
    least = len(json.dumps({"prompt": "\U0001f34e" * 100, "negative_prompt": "\U0001f34e" * 100}))

    async def chunks() -> Any:
        yield b" " * 2**20

    for path, kind, status in (
        (DRAW, "application/json", 413),
        ("/sdapi/v1/txt2img", "application/json", 413),
        ("/v1/images/edits", "multipart/form-data; boundary=x", 400),
        ("/sdapi/v1/img2img", "application/json", 422),
    ):
        for body in (b" " * 2**20, chunks()):
            assert ask(app, "POST", path, content=body, headers={"content-type": kind}).status_code == status
    assert least < app.state.settings.max_text < 2**17


def test_a_body_of_another_type_is_refused_unread(app: Any) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        for path in (DRAW, "/sdapi/v1/options"):
            status, body = answer_unread(app, {"content-type": kind, "content-length": "9"}, path)
            assert (status, code_of(body)) == (415, "unsupported_media_type")


def test_a_body_without_a_right_key_is_refused_unread(locked: Any) -> None:
    assert answer_unread(locked, {"content-type": "application/json", "content-length": "9"})[0] == 401


def test_a_body_that_does_not_say_its_size_is_counted() -> None:
    app = app_of(FakeScheduler(), max_body=1000)

    async def chunks() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n'
        for _ in range(11):
            yield b" " * 100

    for path, kind in ((DRAW, "application/json"), ("/v1/images/edits", "multipart/form-data; boundary=x")):
        answer = ask(app, "POST", path, content=chunks(), headers={"content-type": kind})
        assert (answer.status_code, code_of(answer.json())) == (413, "body_too_large")


@pytest.mark.parametrize(
    "path", ["/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img"]
)
def test_where_nobody_can_have_a_place_nothing_is_read(log: list[MutableMapping[str, Any]], path: str) -> None:
    """The answer is the one that a reader of the whole request would give."""
    scheduler = FakeScheduler().fill()
    app = app_of(scheduler, keys=("one",))
    key = {"authorization": "Bearer one"}
    status, body = answer_unread(app, {**key, "content-length": "9"}, path)
    assert (status, code_of(body)) == (429, "queue_full")
    assert answer_unread(app, {"content-length": "9"}, path)[0] == 401
    line, wrong = lines_of(log)
    assert (line["status"], line["outcome"], line["route"]) == (429, "queue_full", path)
    assert (wrong["status"], wrong["route"]) == (401, path)
    assert (
        'request_rejected_total{model_name="emoji",reason="queue_full"} 1.0'
        in asyncio.run(app.state.metrics.text()).decode()
    )
    scheduler.empty()
    readable = {**key, "content-type": "application/json", "content-length": "9"}
    assert answer_unread(app, readable)[0] == 400  # for want of a body


def test_whoever_is_not_drawn_for_is_answered_by_a_full_server_too() -> None:
    app = app_of(FakeScheduler().fill())
    assert [ask(app, "GET", path).status_code for path in ("/v1/models", "/latentrt/queue", "/health/ready")] == [
        200
    ] * 3


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"1", b'"a"', b"\xff", b'{"prompt": NaN}', b'{"prompt":"\\ud800"}', b"[" * 99999]
)
def test_malformed_bodies_are_the_clients_fault(app: Any, body: bytes) -> None:
    answer = ask(app, "POST", DRAW, content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, code_of(answer.json())) == (400, "invalid_value")


@pytest.mark.parametrize(
    "body", [b"", b"--x", b"zzz", b"--x\r\n\r\n\r\n--x--", b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--"]
)
def test_malformed_forms_are_the_clients_fault(app: Any, body: bytes) -> None:
    for kind in ("multipart/form-data; boundary=x", "multipart/form-data"):
        answer = ask(app, "POST", "/v1/images/edits", content=body, headers={"content-type": kind})
        assert (answer.status_code, code_of(answer.json())) == (400, "invalid_value")


def test_a_body_that_dawdles_is_given_up() -> None:
    with live(app_of(FakeScheduler(), body_timeout=0.05)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            head = "Host: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n"
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
    assert (answer.status_code, code_of(answer.json())) == (503, "insufficient_storage")
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
    assert (answer.status_code, code_of(answer.json())) == (503, "insufficient_storage")
