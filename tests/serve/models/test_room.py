"""Models that nobody needs are dropped: for another one's room, and after a while."""

from __future__ import annotations

import pytest

from latentrt.errors import RequestError
from latentrt.serve.http.models import loader
from latentrt.serve.process.config import MIB
from tests.serve.models.conftest import Serve
from tests.support.serve.fakes import code_of

ROOM = 250  # MiB: of two of the three models


def test_the_least_recently_used_is_dropped(several: Serve) -> None:
    server = several("a", "b", "c", model_memory=ROOM)
    for name, loaded in (("b", {"a", "b"}), ("a", {"a", "b"}), ("c", {"a", "c"}), ("b", {"b", "c"})):
        assert server.draw(name).status_code == 200
        assert server.loaded == loaded
    assert server.ready() == {"a": "unloaded", "b": "ready", "c": "ready"}
    assert 'latentrt_model_loaded{model_name="a"} 0.0' in server.ask("GET", "/metrics").text
    shown = server.ask("GET", "/latentrt/model").json()  # of the first, as it was
    assert (shown["model"], shown["loras"], server.loaded) == ("a", [], {"b", "c"})
    assert server.draw().status_code == 200
    assert server.loads == {"a": 2, "b": 2, "c": 1}


def test_others_are_dropped_where_the_system_has_less(several: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = several("a", "b", model_memory=1000)
    monkeypatch.setattr(loader, "free_memory", lambda: 99 * MIB)
    assert server.draw("b").status_code == 200
    assert server.loaded == {"b"}


def test_one_with_requests_stays(several: Serve) -> None:
    server = several("a", "b", "c", model_memory=ROOM)
    with server.waiting("a"):  # used longest ago, but needed
        assert server.draw("b").status_code == 200
        with server.waiting("b"):
            late = server.draw("c", timeout=0.05)
            assert (late.status_code, code_of(late.json())) == (503, "model_loading")
            assert "beside a, b" in late.json()["error"]["message"]
            assert server.loads["c"] == 0
        assert server.draw("c").status_code == 200
        assert server.loaded == {"a", "c"}


def test_one_whose_call_goes_on_stays(several: Serve) -> None:
    """Dropped, it would keep its memory, and the device's turn, and nobody would notice if the call hung."""
    server = several("a", "b", model_memory=150)
    before = len(server.fakes["a"].decoded)
    server.fakes["a"].decoding.clear()
    drawing = server.drawing("a")
    server.until(lambda: len(server.fakes["a"].decoded) > before)
    (job,) = server.ask("GET", "/latentrt/queue").json()["jobs"]
    assert server.ask("POST", f"/latentrt/jobs/{job['id']}/cancel").status_code == 200
    assert drawing.result().status_code == 409
    late = server.draw("b", timeout=0.05)
    assert (late.status_code, code_of(late.json())) == (503, "model_loading")
    assert "beside a" in late.json()["error"]["message"]
    dropping = server.call(lambda: server.ask("POST", "/sdapi/v1/unload-checkpoint"))
    server.fakes["a"].decoding.set()
    assert dropping.result().status_code == 200
    assert server.draw("b").status_code == 200


def test_a_model_in_use_yields_in_the_end(several: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that keeps asking for one model does not keep the other from loading."""
    monkeypatch.setattr(loader, "PATIENCE", 0.0)
    server = several("a", "b", model_memory=150)
    with server.waiting("a"):
        other = server.drawing("b")
        server.until(lambda: server.entry("a").yields)
        held = server.drawing("a")
        server.until(lambda: server.entry("a").waiting)
        assert not other.done()
    assert [one.result().status_code for one in (other, held)] == [200, 200]
    assert server.loads == {"a": 2, "b": 1}


def test_what_nobody_uses_is_dropped(several: Serve) -> None:
    server = several("a", "b", idle_unload=0.2)
    assert server.draw("b").status_code == 200
    with server.waiting("b"):
        server.until(lambda: server.loaded == {"b"})  # the first one goes too, but none in use
    server.until(lambda: server.loaded == set())
    assert server.ask("GET", "/health/ready").status_code == 200
    assert server.draw().status_code == 200


def test_models_larger_than_the_room_are_refused_at_the_start(several: Serve) -> None:
    with pytest.raises(RequestError, match=r"the files of a have 100 MiB. Needed: at most 99.*--model-memory"):
        several("a", "b", model_memory=99)
    with pytest.raises(RequestError, match="preloaded have 200 MiB"):
        several("a", "b", model_memory=199, preload=True)


def test_a_background_job_keeps_its_model(several: Serve) -> None:
    server = several("a", "b", model_memory=150)
    assert server.draw("b").status_code == 200
    server.fakes["b"].hold()
    job = server.draw("b", background=True)
    assert job.status_code == 202
    late = server.draw("a", timeout=0.05)
    assert (late.status_code, code_of(late.json())) == (503, "model_loading")
    server.fakes["b"].allow(None)
    path = f"/v1/images/jobs/{job.json()['id']}"
    server.until(lambda: server.ask("GET", path).json()["status"] == "completed")
    assert server.draw("a").status_code == 200
