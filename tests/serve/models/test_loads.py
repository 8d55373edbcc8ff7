"""Models are loaded on demand, beside others that draw; what fails to load ends nothing."""

from __future__ import annotations

import asyncio
import math

import httpx
import pytest

from tests.serve.models.conftest import DRAW, Serve
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import code_of


def test_a_load_waits_for_nobody_and_nobody_for_it(several: Serve) -> None:
    server = several("a", "b")
    assert server.ready() == {"a": "ready", "b": "unloaded"}
    server.may_load["b"].clear()
    late = [server.drawing("b") for _ in range(2)]
    server.until(lambda: server.ask("GET", "/latentrt/queue").json()["waiting"] == 2)
    assert server.draw("a").status_code == 200
    assert server.ready() == {"a": "ready", "b": "loading"}
    assert 'num_images_waiting{model_name="b"} 2.0' in server.ask("GET", "/metrics").text
    server.may_load["b"].set()
    assert [one.result().status_code for one in late] == [200, 200]
    assert server.loads == {"a": 1, "b": 1}
    assert server.ready() == {"a": "ready", "b": "ready"}


def test_waiting_for_a_load_is_bounded(several: Serve) -> None:
    server = several("a", "b", queue=2)
    server.may_load["b"].clear()
    first = server.drawing("b", n=2)
    server.until(lambda: server.entry("b").waiting == 2)
    full = server.draw("b")
    assert (full.status_code, code_of(full.json())) == (429, "queue_full")
    assert "retry-after" in full.headers
    server.may_load["b"].set()
    assert first.result().status_code == 200


def test_a_load_that_takes_too_long_is_refused_by_name(several: Serve) -> None:
    server = several("a", "b")
    server.may_load["b"].clear()
    late = server.draw("b", timeout=0.05)
    assert (late.status_code, code_of(late.json())) == (503, "model_loading")
    assert "the model b was not loaded" in late.json()["error"]["message"]
    assert "retry-after" in late.headers
    server.may_load["b"].set()
    server.until(lambda: server.ready()["b"] == "ready")  # the next one finds it
    assert server.loads["b"] == 1


def test_a_client_that_leaves_waits_no_more(several: Serve) -> None:
    server = several("a", "b")
    server.may_load["b"].clear()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}{DRAW}", json={"prompt": "an owl", "model": "b"}, timeout=0.2)
    server.until(lambda: server.loads["b"])
    server.until(lambda: not server.entry("b").waiting)
    assert server.ready()["b"] == "loading"
    server.may_load["b"].set()
    assert server.draw("b").status_code == 200
    assert server.loads["b"] == 1


def test_one_that_cannot_be_loaded_does_not_make_the_server_unready(several: Serve) -> None:
    server = several("a", "b", idle_unload=0.1)
    server.until(lambda: not server.loaded)
    server.broken.add("b")
    assert server.draw("b").status_code == 503
    assert server.ready() == {"a": "unloaded", "b": "failed"}
    assert server.ask("GET", "/health/ready").status_code == 200


def test_what_cannot_be_loaded_is_tried_again_later(several: Serve) -> None:
    server = several("a", "b")
    server.broken.add("b")
    for _ in range(2):
        failed = server.draw("b")
        assert (failed.status_code, code_of(failed.json())) == (503, "model_failed")
        assert "the model b could not be loaded" in failed.json()["error"]["message"]
        assert 1 <= int(failed.headers["retry-after"]) <= 30
    assert server.loads["b"] == 1
    assert server.draw("a").status_code == 200
    assert server.ready() == {"a": "ready", "b": "failed"}
    text = server.ask("GET", "/metrics").text
    assert 'model_loads_total{model_name="b",outcome="failed"} 1.0' in text
    assert 'latentrt_ready{model_name="b"} 0.0' in text
    server.broken.clear()
    server.entry("b").again = -math.inf
    assert server.draw("b").status_code == 200


def test_a_model_that_fails_its_self_check_is_not_loaded(several: Serve) -> None:
    server = several("a", "b")
    server.fakes["b"].broken.add("unet")
    failed = server.draw("b")
    assert (failed.status_code, code_of(failed.json())) == (503, "model_failed")
    assert server.loaded == {"a"}
    server.until(lambda: server.engine() is None)  # its memory is given back
    assert server.draw("a").status_code == 200


def test_all_are_loaded_at_the_start_if_the_settings_say_so(several: Serve) -> None:
    server = several("a", "b", preload=True)
    assert server.loads == {"a": 1, "b": 1}
    server.until(lambda: server.ready() == {"a": "ready", "b": "ready"})


def test_a_drain_finishes_what_waits_for_a_load(several: Serve) -> None:
    server = several("a", "b")
    server.fakes["a"].hold()
    server.may_load["b"].clear()
    running, waiting = server.drawing("a"), server.drawing("b")
    server.until(lambda: server.entry("b").waiting and server.entry("a").running)
    server.models.drain()
    assert server.ask("GET", "/health/ready").status_code == 503
    for name in ("a", "b"):
        refused = server.draw(name)
        assert (refused.status_code, code_of(refused.json())) == (503, "draining")
    drained = server.call(lambda: asyncio.run(server.models.drained(PATIENCE)))
    server.fakes["a"].allow(None)
    assert running.result().status_code == 200
    assert not drained.done()
    server.may_load["b"].set()
    assert (waiting.result().status_code, drained.result()) == (200, True)


def test_a_drain_that_takes_too_long_fails_what_waits_for_a_load(several: Serve) -> None:
    server = several("a", "b")
    server.may_load["b"].clear()
    waiting = server.drawing("b")
    server.until(lambda: server.entry("b").waiting)
    loop = server.entry("b").loading.get_loop()
    server.models.drain()
    assert asyncio.run_coroutine_threadsafe(server.models.drained(0.05), loop).result() is False
    assert (waiting.result().status_code, code_of(waiting.result().json())) == (503, "draining")
