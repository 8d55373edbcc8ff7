"""The metrics tell the story that clients and the log tell."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from latentrt.errors import NetworkError
from latentrt.serve.core.observer import Observer
from latentrt.serve.http.app import create_app
from latentrt.serve.process.frequent import OTHER, TRACKED, Frequent
from latentrt.serve.process.keys import label_of
from latentrt.serve.process.metrics import Metrics
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import ROWS, FakeScheduler, app_of, catalog_of, get, live, post, until

DRAW = "/v1/images/generations"


def values(text: str) -> dict[str, float]:
    """Every sample by its name and labels but the model's."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {name: value for name, value in sample.labels.items() if name != "model_name"}
            rest = ",".join(f"{name}={value}" for name, value in sorted(labels.items()))
            found[sample.name + (f"[{rest}]" if rest else "")] = sample.value
    return found


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def url(scheduler: FakeScheduler) -> Iterator[str]:
    with live(app_of(scheduler)) as url:
        yield url


def test_requests_are_counted_as_they_ended(url: str, scheduler: FakeScheduler) -> None:
    with capture_logs() as log:
        for body in ({"n": 2}, {}, {"size": "7x7"}, {"model": "x"}, {"stream": True}):
            post(f"{url}{DRAW}", json={"prompt": "a", **body})
        scheduler.fill()
        post(f"{url}{DRAW}", json={"prompt": "a"})
        scheduler.empty()
        scheduler.fails = NetworkError("a", needed="b", fix="c")
        for stream in (False, True):
            post(f"{url}{DRAW}", json={"prompt": "a", "stream": stream})
        asyncio.run(until(lambda: len(log) >= 10))  # a request's line comes after its answer; two have a traceback too
    told = values(get(f"{url}/metrics").text)
    outcomes = {"ok": 3, "unsupported_size": 1, "model_not_found": 1, "queue_full": 1, "engine_error": 2}
    for outcome, count in outcomes.items():
        assert told[f"latentrt_requests_total[outcome={outcome},route={DRAW}]"] == count
        assert sum(line.get("outcome") == outcome for line in log if line["event"] == "request") == count
    for reason in ("unsupported_size", "model_not_found", "queue_full"):
        assert told[f"latentrt_request_rejected_total[reason={reason}]"] == 1
    assert "latentrt_request_rejected_total[reason=engine_error]" not in told
    assert told["latentrt_e2e_request_latency_seconds_count"] == 3
    assert told["latentrt_request_queue_time_seconds_count"] == 5


def test_gauges_follow_and_come_back_to_zero(url: str, scheduler: FakeScheduler) -> None:
    gauges = ("num_requests_running", "num_requests_waiting", "num_images_running")

    async def work() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=PATIENCE) as client:

            async def read() -> dict[str, float]:
                told = values((await client.get("/metrics")).text)
                return {name: told[f"latentrt_{name}"] for name in gauges}

            scheduler.delay = 0.005
            drawing = asyncio.create_task(client.post(DRAW, json={"prompt": "a", "n": 3}))
            await until(lambda: scheduler.running == 3)
            seen = await read()
            assert seen in ({gauges[0]: 1, gauges[1]: 0, gauges[2]: 3}, {gauges[0]: 1, gauges[1]: 0, gauges[2]: 0})
            queue = (await client.get("/latentrt/queue")).json()
            assert {job["rows"] for job in queue["jobs"]} <= {ROWS, 20}
            await drawing
            assert await read() == dict.fromkeys(gauges, 0.0)

    asyncio.run(work())


def test_what_the_scheduler_tells_is_measured() -> None:
    metrics = Metrics("m")
    observer: Observer = metrics
    observer.ticked(0.02, 4, 2)
    observer.staged("decode", 0.5)
    observer.ended("done", 1.5)
    observer.ended("run_timeout", 9.0)
    observer.faulted(False)
    observer.faulted(True)
    told = values(asyncio.run(metrics.text()).decode())
    assert told["latentrt_step_seconds_sum"] == 0.02
    assert told["latentrt_batch_size_bucket[le=4.0]"] == 1
    assert told["latentrt_batch_size_bucket[le=2.0]"] == 0
    assert told["latentrt_stage_seconds_sum[stage=decode]"] == 0.5
    assert told["latentrt_images_total[outcome=done]"] == 1
    assert told["latentrt_images_total[outcome=run_timeout]"] == 1
    assert told["latentrt_engine_faults_total[kind=raised]"] == told["latentrt_engine_faults_total[kind=hung]"] == 1
    lines = [line for line in asyncio.run(metrics.text()).decode().splitlines() if line.startswith("latentrt")]
    assert all('model_name="m"' in line for line in lines)


@pytest.mark.parametrize("state", ["starting", "ready", "draining", "failed"])
def test_health(url: str, scheduler: FakeScheduler, state: str) -> None:
    scheduler.forced = state
    assert get(f"{url}/health/live").json() == {"status": "ok"}
    answer = get(f"{url}/health/ready")
    assert (answer.status_code, answer.json()["status"]) == ((200, "ok") if state == "ready" else (503, state))
    assert values(get(f"{url}/metrics").text)["latentrt_ready"] == (state == "ready")
    if state != "ready":
        refused = post(f"{url}{DRAW}", json={"prompt": "a"})
        code = "draining" if state == "draining" else "not_ready"
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, code)


def test_the_queue_shows_progress_and_ones_own_job_can_be_cancelled(scheduler: FakeScheduler) -> None:
    app: Any = app_of(scheduler, keys=("one", "two"))

    async def work() -> None:
        scheduler.hold = asyncio.Event()
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            client.headers["authorization"] = "Bearer one"
            headers = {"x-request-id": "mine"}
            body = {"prompt": "a secret", "n": 2, "num_inference_steps": ROWS}
            drawing = asyncio.create_task(client.post(DRAW, json=body, headers=headers))
            await until(lambda: any(handle.started for handle in scheduler.handles))
            queue = await client.get("/latentrt/queue")
            assert "secret" not in queue.text
            (job,) = queue.json()["jobs"]
            assert (job["id"], job["state"], job["pictures"], job["rows"]) == ("mine", "running", 2, ROWS)
            assert (await client.post("/latentrt/jobs/other/cancel")).status_code == 404
            others = {"authorization": "Bearer two"}
            assert (await client.post("/latentrt/jobs/mine/cancel", headers=others)).status_code == 404
            assert (await client.post("/latentrt/jobs/mine/cancel")).json() == {"cancelled": 1}
            answer = await drawing
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "cancelled")
            assert (await client.get("/latentrt/queue")).json()["jobs"] == []
            told = values((await client.get("/metrics")).text)
            assert told[f"latentrt_requests_total[outcome=cancelled,route={DRAW}]"] == 1
            assert "latentrt_request_rejected_total[reason=cancelled]" not in told  # it had been taken

    asyncio.run(work())


def test_what_a_page_may_offer(url: str) -> None:
    model = get(f"{url}/latentrt/model").json()
    assert (model["model"], model["size"], model["step"], model["limits"]["max_n"]) == ("emoji", "128x128", 8, 10)
    assert "euler-a" in model["schedulers"]


# ---- What clients choose


def test_the_most_frequent_names_have_labels_of_their_own() -> None:
    names = Frequent(2)
    assert [names.label(name) for name in "aabbc"] == [
        ("a", None),
        ("a", None),
        ("b", None),
        ("b", None),
        (OTHER, None),
    ]
    assert [names.label("c", 3), names.label("c")] == [(OTHER, None), ("c", "a")]
    assert names.label("a") == (OTHER, None)
    for number in range(5000):  # each once: none of them is worth a label, and none is remembered for long
        assert names.label(f"{number}")[0] == OTHER or number > TRACKED
    assert len(names._counts) <= TRACKED + 1


def test_pictures_are_counted_by_size_and_client() -> None:
    app = app_of(FakeScheduler(), keys=("one",))

    async def go() -> str:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            for number in range(20):
                body = {"prompt": "a", "n": 2, "size": f"{64 + 8 * number}x64"}
                answer = await client.post(DRAW, json=body, headers={"authorization": "Bearer one"})
                assert answer.status_code == 200
            await client.post(DRAW, json={"prompt": "a"})
            return (await client.get("/metrics")).text

    with capture_logs() as log:
        told = values(asyncio.run(go()))
    sizes = {name: count for name, count in told.items() if "images_by_size_total" in name}
    assert sizes["latentrt_images_by_size_total[size=other]"] == 8
    assert (len(sizes), sum(sizes.values())) == (17, 40)
    name = f"key-{hashlib.sha256(b'one').hexdigest()[:8]}"
    assert told[f"latentrt_images_by_client_total[client={name}]"] == 40
    lines = [line for line in log if line["event"] == "request" and line["route"] == DRAW]
    assert [line.get("client") for line in lines] == [name] * 20 + [None]
    assert label_of("10.0.0.1") == label_of("10.0.0.1") != label_of("10.0.0.2")
    assert "10.0" not in label_of("10.0.0.1")


def test_a_gpus_memory_is_told() -> None:
    metrics = Metrics("m")
    app = create_app(FakeScheduler(), catalog_of(), metrics=metrics, gpu_memory=lambda: (3, 8))
    with live(app) as url:
        told = values(get(f"{url}/metrics").text)
        assert (told["latentrt_gpu_memory_free_bytes"], told["latentrt_gpu_memory_total_bytes"]) == (3, 8)
        memory = get(f"{url}/sdapi/v1/memory").json()
        (entry,) = app.state.models.entries
        entry.context = replace(entry.context, gpu_memory=lambda: (4, 8))  # dropped, and loaded again
        assert values(get(f"{url}/metrics").text)["latentrt_gpu_memory_free_bytes"] == 4
    assert memory["cuda"] == {"system": {"free": 3, "used": 5, "total": 8}}
    assert memory["ram"]["used"] > 0
