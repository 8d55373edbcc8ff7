"""Jobs without an open connection: followed, fetched, cancelled, kept for a while; each by its own client alone."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import MutableMapping
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from latentrt.errors import NetworkError
from tests.serve.conftest import eventually
from tests.serve.process.test_metrics import values
from tests.support.serve.fakes import ROWS, FakeScheduler, app_of, get, live, post

DRAW, EDIT, JOBS = "/v1/images/generations", "/v1/images/edits", "/v1/images/jobs"
BODY: dict[str, Any] = {"prompt": "a", "background": True}


def order(url: str, headers: dict[str, str] | None = None, **body: Any) -> str:
    """Order a job; return its path."""
    answer = post(f"{url}{DRAW}", json={**BODY, **body}, headers=headers)
    assert answer.status_code == 202, answer.text
    path = str(answer.url.join(answer.headers["location"]))
    assert path == f"{url}{JOBS}/{answer.json()['id']}"
    return path


def over(path: str) -> dict[str, Any]:
    """Wait for a job; return its status."""
    while True:
        status: dict[str, Any] = get(path).json()
        if status["status"] not in ("queued", "in_progress"):
            return status
        time.sleep(0.005)


def let_go(scheduler: FakeScheduler) -> None:
    """Let pictures that are held be finished; the server's loop is in another thread."""
    hold, task = scheduler.hold, next(iter(scheduler.tasks.values()))
    assert hold is not None
    task.get_loop().call_soon_threadsafe(hold.set)


def delete(path: str) -> Any:
    return httpx.delete(path, timeout=60).json()


def test_a_job_is_followed_and_its_result_is_what_the_request_would_have_got(
    url: str, app: Any, scheduler: FakeScheduler, log: list[MutableMapping[str, Any]]
) -> None:
    scheduler.hold = asyncio.Event()
    asked = {"n": 2, "seed": 7, "response_format": "url", "output_format": "webp"}
    path = order(url, **asked, partial_images=1)
    eventually(lambda: get(path).json()["preview"])
    status = get(path).json()
    told = {name: status[name] for name in ("object", "status", "progress", "n", "done", "row", "rows", "size")}
    assert told == {
        **{"object": "image.job", "status": "in_progress", "progress": 25, "n": 2, "done": 0},
        **{"row": 1, "rows": ROWS, "size": "128x128"},
    }
    assert [status[name] for name in ("completed_at", "expires_at", "error", "result")] == [None] * 4
    assert status["eta_seconds"] >= 0
    shown = get(url + status["preview"])
    assert (shown.headers["content-type"], Image.open(BytesIO(shown.content)).size) == ("image/webp", (128, 128))
    early = get(f"{path}/result")
    assert (early.status_code, early.json()["error"]["code"]) == (409, "not_finished")
    assert early.headers["x-should-retry"] == "false"
    assert [one["id"] for one in get(url + JOBS).json()["data"]] == [status["id"]]
    let_go(scheduler)
    ended = over(path)
    assert (ended["status"], ended["progress"], ended["done"]) == ("completed", 100, 2)
    assert abs(ended["expires_at"] - ended["completed_at"] - 600) <= 1
    result, direct = get(url + ended["result"]).json(), post(url + DRAW, json={"prompt": "a", **asked}).json()
    assert {**result, "created": 0} == {**direct, "created": 0}
    assert [one["seed"] for one in result["data"]] == [7, 8]
    assert get(url + ended["preview"]).content == base64.b64decode(result["data"][1]["b64_json"])
    assert scheduler.handles == ()
    assert [job.handle for job in app.state.jobs.own("127.0.0.1")] == [None]  # no arrays are kept
    (line,) = [line for line in log if line["event"] == "job"]
    assert (line["outcome"], line["job"], line["done"], line["size"]) == ("completed", status["id"], 2, "128x128")
    (ordered,) = [line for line in log if line["event"] == "request" and line["status"] == 202]
    assert (ordered["job"], ordered["id"]) == (status["id"], status["request_id"])
    metrics = values(get(f"{url}/metrics").text)
    assert metrics["latentrt_background_jobs_total[outcome=completed]"] == 1
    assert metrics["latentrt_background_results"] == 1
    assert metrics["latentrt_background_results_bytes"] == sum(
        len(base64.b64decode(one["b64_json"])) for one in result["data"]
    )
    assert metrics["latentrt_images_by_size_total[size=128x128]"] == 4
    assert metrics["latentrt_e2e_request_latency_seconds_count"] == 2
    assert delete(path) == {"id": status["id"], "object": "image.job", "status": "completed", "deleted": True}
    gone = get(path)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
    assert "expired" in gone.json()["error"]["message"]


def test_openais_client_orders_and_fetches(client: openai.OpenAI) -> None:
    job: Any = client.images.generate(prompt="a", extra_body={"background": True})
    while (status := client.get(f"/images/jobs/{job.id}", cast_to=httpx.Response).json())["result"] is None:
        assert status["status"] in ("queued", "in_progress")
    result = client.get(f"/images/jobs/{job.id}/result", cast_to=openai.types.ImagesResponse)
    assert result.data
    assert result.data[0].b64_json


def test_an_edits_picture_is_read_before_the_answer(url: str, scheduler: FakeScheduler) -> None:
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 64, 3), np.uint8))
    buffer = BytesIO()
    noise.save(buffer, "PNG")
    form = {"prompt": "a", "background": "true", "size": "64x64"}
    answer = post(url + EDIT, data=form, files={"image": ("a", buffer.getvalue())})
    path = f"{url}{JOBS}/{answer.json()['id']}"
    over(path)
    (drawn,) = get(f"{path}/result").json()["data"]
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(drawn["b64_json"])))), noise)
    bad = post(url + EDIT, data=form, files={"image": ("a", b"none")})
    assert (bad.status_code, bad.json()["error"]["code"]) == (400, "image_decode_failed")
    assert len(scheduler.submitted) == 1


def test_a_job_is_its_keys_alone() -> None:
    scheduler = FakeScheduler()
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    with live(app_of(scheduler, keys=("one", "two"))) as url:
        path = order(url, headers=one)
        eventually(lambda: get(path, headers=one).json()["status"] == "completed")
        for rest in ("", "/preview", "/result"):
            assert get(path + rest, headers=two).status_code == 404
            assert get(path + rest).status_code == 401
            assert get(path + rest, headers=one).status_code == 200
        assert httpx.delete(path, headers=two).status_code == 404
        assert [len(get(url + JOBS, headers=each).json()["data"]) for each in (one, two)] == [1, 0]


def test_a_job_that_is_cancelled_is_kept_until_it_is_deleted_again(url: str, scheduler: FakeScheduler) -> None:
    scheduler.hold = asyncio.Event()
    path = order(url)
    assert get(f"{path}/preview").json()["error"]["code"] == "no_preview"
    assert httpx.delete(path, headers={"origin": "https://page.example"}).status_code == 403
    other = post(path)
    assert (other.status_code, set(other.headers["allow"].split(", "))) == (405, {"GET", "DELETE"})
    cancelled = delete(path)
    assert (cancelled["status"], cancelled["deleted"]) == ("cancelled", False)
    assert scheduler.handles == ()
    status, result = get(path).json(), get(f"{path}/result")
    assert (status["status"], status["error"]["code"]) == ("cancelled", "cancelled")
    assert (result.status_code, result.json()["error"]["code"]) == (409, "cancelled")
    assert delete(path)["deleted"]
    assert get(path).status_code == 404


def test_a_job_that_fails_has_the_error_that_its_request_would_have_got(url: str, scheduler: FakeScheduler) -> None:
    scheduler.fails = NetworkError("a", needed="b", fix="c")
    path, direct = order(url), post(url + DRAW, json={"prompt": "a"})
    status, result = over(path), get(f"{path}/result")
    assert (status["status"], status["error"]) == ("failed", direct.json()["error"])
    assert (result.status_code, result.json()) == (direct.status_code, direct.json())
    assert values(get(f"{url}/metrics").text)["latentrt_background_jobs_total[outcome=engine_error]"] == 1


@pytest.mark.parametrize(
    ("settings", "body", "param"),
    [
        ({}, {"stream": True}, "background"),
        ({"ray": True, "replicas": "2"}, {}, "background"),
        ({}, {"background": False, "webhook_url": "https://a.example/"}, "webhook_url"),
        ({}, {"webhook_url": "https://a.example/"}, "webhook_url"),
        ({}, {"background": "transparent"}, "background"),
    ],
)
def test_what_cannot_be_is_refused_by_name(settings: dict[str, Any], body: dict[str, Any], param: str) -> None:
    scheduler = FakeScheduler()
    with live(app_of(scheduler, **settings)) as url:
        answer = post(url + DRAW, json={**BODY, **body})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert scheduler.seen == []


def test_a_job_is_refused_by_the_same_rules_as_others(url: str, scheduler: FakeScheduler) -> None:
    assert post(f"{url}/sdapi/v1/txt2img", json=BODY).json()["param"] == "background"
    scheduler.hold = asyncio.Event()
    scheduler.delay = 60
    before = [get(order(url)).json()["ahead"] for _ in range(2)]
    assert before == [0, 1]
    for job in get(url + JOBS).json()["data"]:
        delete(f"{url}{JOBS}/{job['id']}")
        delete(f"{url}{JOBS}/{job['id']}")
    scheduler.fill()
    assert post(url + DRAW, json=BODY).json()["error"]["code"] == "queue_full"
    scheduler.empty()
    scheduler.forced = "draining"
    assert post(url + DRAW, json=BODY).status_code == 503
    assert get(url + JOBS).json() == {"object": "list", "data": []}


def test_results_are_kept_within_bounds() -> None:
    app = app_of(FakeScheduler(), max_results=8, results_memory=1, keep_results=30)
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 255, (512, 512, 3), np.uint8))
    buffer = BytesIO()
    noise.save(buffer, "PNG")
    with live(app) as url:
        paths = [order(url, seed=seed) for seed in range(3) if not seed or over(paths_of(url)[0])]
        assert [get(path).status_code for path in paths] == [404, 200, 200]  # a quarter of 8 is one client's
        form = {"prompt": "a", "background": "true", "size": "512x512"}
        large = post(url + EDIT, data=form, files={"image": ("a", buffer.getvalue())}).json()["id"]
        assert over(f"{url}{JOBS}/{large}")["error"]["code"] == "result_too_large"
        told = values(get(f"{url}/metrics").text)
        assert told["latentrt_background_results_dropped_total[reason=room]"] == 2


def paths_of(url: str) -> list[str]:
    return [f"{url}{JOBS}/{one['id']}" for one in get(url + JOBS).json()["data"]]


def test_results_expire() -> None:
    with live(app_of(FakeScheduler(), keep_results=0.2)) as url:
        path = order(url)
        eventually(lambda: get(path).status_code == 404)
        assert values(get(f"{url}/metrics").text)["latentrt_background_results_bytes"] == 0


def test_while_the_server_ends_results_can_be_fetched_for_a_moment(
    url: str, app: Any, scheduler: FakeScheduler
) -> None:
    scheduler.hold = asyncio.Event()
    path = order(url)
    loop = next(iter(scheduler.tasks.values())).get_loop()
    ending = asyncio.run_coroutine_threadsafe(app.state.jobs.drained(time.monotonic(), 60), loop)
    let_go(scheduler)
    over(path)
    time.sleep(0.05)
    assert not ending.done()
    assert get(f"{path}/result").status_code == 200
    assert ending.result()
