"""What stands around the application behind Ray: answers of its proxies, its prefix, how many replicas there are."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any
from urllib.parse import urljoin

import httpx
import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from latentrt.command.serve import RAY
from latentrt.serve import ray_proxy
from latentrt.serve.ray_proxy import InOurForm, WithoutPrefix
from latentrt.serve.ray_scaling import RUNNING, WAITING, ByPictures
from tests.support.serve.fakes import FakeScheduler, app_of


def ask(app: Any, method: str, path: str, **content: Any) -> httpx.Response:
    async def go() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **content)

    return asyncio.run(go())


def proxy(answer: Response) -> Any:
    async def say(_: Any) -> Response:
        return answer

    return InOurForm(Starlette(routes=[Route("/{path:path}", say, methods=["GET", "POST"])]))


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [(404, 503, "draining"), (500, 503, "not_ready"), (503, 503, "not_ready"), (429, 429, "queue_full")],
)
def test_what_a_proxy_answers_is_told_in_our_form(status: int, told: int, code: str) -> None:
    answer = ask(proxy(PlainTextResponse("Internal Server Error", status)), "POST", "/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (told, code)
    assert int(answer.headers["retry-after"]) >= 1


def test_where_a_proxy_says_nothing_the_replica_has_died() -> None:
    async def silent(*_: Any) -> None:
        pass

    answer = ask(InOurForm(silent), "POST", "/v1/images/generations")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")


def test_the_applications_own_answers_and_rays_health_pass() -> None:
    assert ask(proxy(JSONResponse({"a": 1}, 404)), "GET", "/v1/models").json() == {"a": 1}
    assert ask(proxy(PlainTextResponse("b")), "GET", "/metrics").text == "b"
    assert ask(proxy(PlainTextResponse("DRAINING", 503)), "GET", "/-/healthz").text == "DRAINING"


def test_proxies_are_told_of_it_by_name() -> None:
    assert RAY["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == f"{ray_proxy.__name__}:middlewares"
    assert [each.cls for each in ray_proxy.middlewares()] == [InOurForm]


def test_below_a_prefix_all_rules_for_paths_hold() -> None:
    own = app_of(FakeScheduler(), keys=("one",))
    own.add_middleware(WithoutPrefix)
    app = Starlette(routes=[Mount("/draw", own)])
    for path, status in (("/health/ready", 200), ("/static/app.js", 200), ("/", 200), ("/v1/models", 401)):
        assert ask(app, "GET", f"/draw{path}").status_code == status
    drawn = ask(
        app, "POST", "/draw/v1/images/generations", json={"prompt": "a"}, headers={"authorization": "Bearer one"}
    )
    assert (drawn.status_code, len(drawn.json()["data"])) == (200, 1)


@pytest.mark.parametrize("outer", ["", "/pictures"])  # of a proxy before Ray's, which takes it away
def test_below_a_prefix_page_and_description_lead_to_it(outer: str) -> None:
    own = app_of(FakeScheduler())
    own.add_middleware(WithoutPrefix)

    async def routed(scope: Any, receive: Any, send: Any) -> None:
        await own({**scope, "root_path": "/draw"}, receive, send)

    page = ask(routed, "GET", "/draw")
    assert urljoin(f"https://a.example{outer}/draw", page.headers["location"]) == f"https://a.example{outer}/draw/"
    assert ask(routed, "GET", "/draw/").headers["content-type"].startswith("text/html")
    description = ask(routed, "GET", "/draw/openapi.json").json()
    (url,) = [urljoin(f"https://a.example{outer}/draw/openapi.json", one["url"]) for one in description["servers"]]
    path = next(path for path in description["paths"] if path.endswith("/models"))
    assert f"{url.rstrip('/')}{path}" == f"https://a.example{outer}/draw/v1/models"
    assert ask(routed, "GET", "/draw/v1/models").status_code == 200
    assert ask(routed, "GET", "/draw/latentrt/queue/").status_code == 404  # no redirect to an address without a prefix


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({WAITING: {"a": 6.0, "b": 2.0}, RUNNING: {"a": 4.0, "b": 4.0}}, 4.0),
        ({WAITING: {"a": 0.0}, RUNNING: {"a": 0.0}}, 0.0),  # Ray keeps to the fewest
        ({}, 3),  # none has told yet
    ],
)
def test_there_are_seats_for_all_pictures(told: dict[str, dict[str, float]], wanted: float) -> None:
    context = SimpleNamespace(aggregated_metrics=told, target_num_replicas=3)
    assert ByPictures(seats=4)(context) == (wanted, {})
