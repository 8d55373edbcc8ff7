"""LoRAs that requests name, served by both APIs."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.clients import DRAW, EDIT
from latentrt_export.merge_bundle import merge_bundle
from tests.serve.test_pixel_models import SD, Server, decoded, serving
from tests.support.models.loras import PRODUCTS, write_lora

Exported = Callable[[str], tuple[Path, Path]]
ASKED: dict[str, Any] = {"steps": 2, "seed": 3, "guidance": 4.0}
BODY: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "seed": 3, "guidance_scale": 4}


@pytest.fixture(scope="module")
def server(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("served")
    checkpoint, bundle = exported("sd")
    merge_bundle(bundle, root / "bundle", (), adapters=True)
    (root / "loras").mkdir()
    for name, layout in (("flat", "kohya"), ("sharp", "diffusers")):
        write_lora(root / "loras" / f"{name}.safetensors", checkpoint, layout, PRODUCTS)
    (root / "loras" / "broken.safetensors").write_bytes(b"nothing")
    yield from serving(root / "bundle", adapters=root / "loras")


def drawn(server: Server, **settings: Any) -> Any:
    return np.asarray(server.alone("a cat", **ASKED | settings)[0])


def of_openai(server: Server, **fields: Any) -> Any:
    return decoded(server.post(DRAW, BODY | fields)["data"][0]["b64_json"])


def test_openais_api(server: Server) -> None:
    expected = drawn(server, lora={"flat": 0.5, "sharp": (0.25, 1.0)})
    np.testing.assert_array_equal(of_openai(server, lora={"flat": 0.5, "sharp": [0.25, 1]}), expected)
    tagged = {"prompt": "a cat<lora:flat:0.5><lora:sharp:te=1:unet=0.25>", "prompt_syntax": "a1111"}
    np.testing.assert_array_equal(of_openai(server, **tagged), drawn(server, **{**ASKED, **_asked(tagged)}))
    assert (of_openai(server) != expected).any()
    refused = server.refusal(DRAW, {**BODY, "lora": {"other": 1}})
    assert "there is no LoRA 'other'" in refused["message"]
    assert "flat" in refused["message"]
    for lora in ({"../flat": 1}, {"flat": [1, 2, 3]}, {"broken": 1}):
        assert "LoRA" in server.refusal(DRAW, {**BODY, "lora": lora})["message"]
    told = server.refusal(DRAW, {**BODY, "lora": {"broken": 1}})["message"]
    assert "the LoRA 'broken' is cut" in told or "the LoRA 'broken' has no safetensors header" in told
    assert "served" not in told  # where the file lies


def _asked(tagged: dict[str, Any]) -> dict[str, Any]:
    return {"prompt_syntax": tagged["prompt_syntax"], "lora": {"flat": 0.5, "sharp": (0.25, 1.0)}}


def test_edits(server: Server) -> None:
    picture = Image.fromarray(np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3))
    buffer = BytesIO()
    picture.save(buffer, "PNG")
    fields = {**{key: str(value) for key, value in BODY.items()}, "lora": '{"flat": 0.5}'}
    answer = server.ask("POST", EDIT, data=fields, files={"image": buffer.getvalue()})
    assert answer.status_code == 200, answer.text
    expected = drawn(server, lora={"flat": 0.5}, image=picture)
    np.testing.assert_array_equal(decoded(answer.json()["data"][0]["b64_json"]), expected)
    answer = server.ask("POST", EDIT, data={**fields, "lora": "{"}, files={"image": buffer.getvalue()})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "lora")
    images = [base64.b64encode(buffer.getvalue()).decode()]
    body = {"prompt": "a cat <lora:flat:0.5>", "steps": 2, "seed": 3, "cfg_scale": 4, "init_images": images}
    (file,) = server.post("/sdapi/v1/img2img", {**body, "width": 16, "height": 16})["images"]
    asked = {"lora": {"flat": 0.5}, "image": picture, "strength": 0.75, "prompt_syntax": "a1111"}
    np.testing.assert_array_equal(decoded(file), np.asarray(server.alone("a cat ", **ASKED | asked)[0]))


def test_the_webui_api(server: Server) -> None:
    assert [one["name"] for one in server.ask("GET", "/sdapi/v1/loras").json()] == ["broken", "flat", "sharp"]
    body = {"prompt": "a cat<lora:sharp:0.5>", "steps": 2, "seed": 3, "cfg_scale": 4}
    answer = server.post(SD, body)
    expected = drawn(server, lora={"sharp": 0.5}, prompt_syntax="a1111")
    np.testing.assert_array_equal(decoded(answer["images"][0]), expected)
    assert answer["parameters"]["prompt"] == body["prompt"]
    assert "there is no LoRA 'x'" in server.refusal(SD, {**body, "prompt": "a <lora:x:1>"})["message"]
