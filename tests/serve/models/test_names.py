"""Which model a request gets: by OpenAI's `model`, and as A1111's clients choose."""

from __future__ import annotations

import base64
from functools import partial
from io import BytesIO

import numpy as np
import pytest
import webuiapi
from PIL import Image

from tests.serve.models.conftest import Serve
from tests.support.serve.fakes import code_of


def test_a_request_names_its_model(several: Serve) -> None:
    server = several("a", "b")
    listed = server.ask("GET", "/v1/models").json()["data"]
    roots = {one["id"]: one["root"] for one in listed}
    assert (listed[0]["id"], roots["dall-e-3"], roots["b"]) == ("a", "a", "b")
    assert server.ask("GET", "/v1/models/b").json()["root"] == "b"
    for name, drawer in (("a", "a"), (None, "a"), ("dall-e-3", "a"), ("b", "b")):
        before = {name: fakes.steps for name, fakes in server.fakes.items()}
        assert server.draw(name).status_code == 200
        assert [name for name, fakes in server.fakes.items() if fakes.steps > before[name] + 2] == [drawer]
    refused = server.draw("c")
    assert (refused.status_code, code_of(refused.json())) == (404, "model_not_found")
    assert "one of a, gpt-image-1, " in refused.json()["error"]["message"]
    assert ", b." in refused.json()["error"]["message"]
    text = server.ask("GET", "/metrics").text
    assert 'latentrt_images_total{model_name="a",outcome="done"} 3.0' in text
    assert 'latentrt_images_total{model_name="b",outcome="done"} 1.0' in text
    assert 'latentrt_model_loads_total{model_name="b",outcome="done"} 1.0' in text
    assert 'latentrt_model_loaded{model_name="b"} 1.0' in text
    assert [server.ask("GET", "/latentrt/model", params={"model": name}).json()["model"] for name in ("", "b")] == [
        "a",
        "b",
    ]
    assert server.ask("GET", "/latentrt/model").json()["models"] == ["a", "b"]


def test_each_may_have_settings_of_its_own(several: Serve) -> None:
    server = several("a", "b", own={"b": {"steps": 2, "aliases": ["dall-e-2", "other"]}}, steps=5)
    for name, model, steps in (("a", "a", 5), ("b", "b", 2), ("other", "b", 2), ("dall-e-3", "a", 5)):
        told = server.ask("GET", "/latentrt/model", params={"model": name}).json()
        assert (told["model"], told["defaults"]["steps"]) == (model, steps)
    before = server.fakes["b"].steps
    assert server.draw("other", num_inference_steps=None).status_code == 200
    assert server.fakes["b"].steps == before + 2


def test_a1111s_client_switches(several: Serve) -> None:
    server = several("a", "b", "c")
    api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")
    assert api.util_get_model_names() == ["a", "b", "c"]
    assert api.util_get_current_model() == "a"
    api.util_set_model("b")
    assert (api.util_get_current_model(), server.loaded) == ("b", {"a", "b"})
    drawn = {"prompt": "an owl", "steps": 3, "alwayson_scripts": {}}
    assert api.txt2img(**drawn).info["sd_model_name"] == "b"
    overridden = api.txt2img(**drawn, override_settings={"sd_model_checkpoint": "c"})
    assert overridden.info["sd_model_name"] == "c"
    assert api.txt2img(**drawn).info["sd_model_name"] == "b"
    given = Image.fromarray(np.zeros((128, 128, 3), np.uint8))
    with pytest.raises(RuntimeError, match="edits no pictures"):
        api.img2img(images=[given], **drawn)
    assert server.draw().status_code == 200  # another API's clients choose by `model`
    assert server.fakes["a"].steps > 2
    unknown = server.ask("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "d"})
    assert (unknown.status_code, unknown.json()["param"]) == (404, "sd_model_checkpoint")
    kept = {"sd_model_checkpoint": "a", "CLIP_stop_at_last_layers": 2}
    assert server.ask("POST", "/sdapi/v1/options", json=kept).status_code == 400
    assert api.util_get_current_model() == "b"
    body = {**drawn, "override_settings": {"sd_model_checkpoint": "c"}, "override_settings_restore_afterwards": False}
    assert server.ask("POST", "/sdapi/v1/txt2img", json=body).status_code == 200
    assert api.util_get_current_model() == "c"


def test_a1111s_client_drops_and_loads_what_it_has_chosen(several: Serve) -> None:
    server = several("a", "b")
    api = webuiapi.WebUIApi(baseurl=f"{server.url}/sdapi/v1")

    def ask(what: str) -> object:
        return api.custom_post(f"sdapi/v1/{what}-checkpoint").json

    beside: dict[str, set[str]] = {"a": set(), "b": {"a"}}
    for chosen, left in beside.items():
        api.util_set_model(chosen)
        for _ in range(2):  # what is done already is no error
            assert (ask("unload"), server.loaded) == ({}, left)
        assert server.ready()[chosen] == "unloaded"
        for _ in range(2):
            assert (ask("reload"), server.loaded) == ({}, {*left, chosen})
    assert server.loads == {"a": 2, "b": 2}
    with server.waiting("b"):
        refused = server.ask("POST", "/sdapi/v1/unload-checkpoint")
        assert (refused.status_code, refused.json()["code"]) == (409, "model_in_use")
        assert "requests need the model b" in refused.json()["detail"]
    assert ask("unload") == {}
    assert api.txt2img(prompt="an owl", steps=3, alwayson_scripts={}).info["sd_model_name"] == "b"


def test_each_key_has_its_own_choice(several: Serve) -> None:
    server = several("a", "b", keys=["one", "two"])
    keys = [{"authorization": f"Bearer {key}"} for key in ("one", "two")]
    chosen = server.ask("POST", "/sdapi/v1/options", json={"sd_model_checkpoint": "b"}, headers=keys[0])
    assert chosen.status_code == 200
    current = [server.ask("GET", "/sdapi/v1/options", headers=key).json()["sd_model_checkpoint"] for key in keys]
    assert current == ["b", "a"]


def test_pictures_are_those_of_each_model_alone(several: Serve) -> None:
    server = several("a", "b")
    both = [server.drawing(name, n=2, num_inference_steps=9) for name in ("a", "b") for _ in range(2)]
    files = {one["b64_json"] for answer in both for one in answer.result().json()["data"]}
    assert len({np.asarray(Image.open(BytesIO(base64.b64decode(file)))).tobytes() for file in files}) == 2  # by seed


def test_jobs_of_all_models_are_shown_and_ended(several: Serve) -> None:
    server = several("a", "b")
    assert server.draw("b").status_code == 200
    before = server.fakes["a"].steps
    server.fakes["a"].hold()
    drawing = [server.drawing("a", num_inference_steps=9)]
    server.fakes["a"].wait_for(before + 1)  # the others wait for its step
    drawing.append(server.drawing("b", num_inference_steps=9))
    path, steps = "/sdapi/v1/txt2img", {"prompt": "an owl", "steps": 9}
    for name in ("a", "b"):
        body = {**steps, "override_settings": {"sd_model_checkpoint": name}}
        drawing.append(server.call(partial(server.ask, "POST", path, json=body)))
    server.until(lambda: len(server.models.handles) == 4)
    queue = server.ask("GET", "/latentrt/queue").json()
    assert sorted(job["model"] for job in queue["jobs"]) == ["a", "a", "b", "b"]
    assert (queue["waiting"] + queue["running"], queue["capacity"]) == (4, 128)
    assert server.ask("GET", "/sdapi/v1/progress").json()["state"]["job_count"] == 1
    assert server.ask("POST", "/sdapi/v1/interrupt").status_code == 200
    for job in queue["jobs"]:
        if job["api"] == "generations":
            assert server.ask("POST", f"/latentrt/jobs/{job['id']}/cancel").json() == {"cancelled": 1}
    server.fakes["a"].allow(None)
    assert [one.result().status_code for one in drawing[:2]] == [409, 409]
    assert {one.result().status_code for one in drawing[2:]} <= {200, 409}  # with what they drew, if anything
    assert max(fakes.steps for fakes in server.fakes.values()) < 15
