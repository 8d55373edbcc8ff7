"""The Images API, asked by the real client over a real socket; the service behind it is a fake."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import re
from io import BytesIO
from typing import Any, get_args, get_type_hints

import openai
import pytest
from openai import types
from PIL import Image
from structlog.testing import capture_logs

from latentrt.errors import NetworkError
from latentrt.serve.core.errors import QueueTimeout
from latentrt.serve.http.openai.schema import EditRequest, GenerateRequest
from tests.support.serve.fake_engine import SPEC
from tests.support.serve.fakes import FakeScheduler, app_of, live, png, post

EVERYTHING: dict[str, Any] = {  # what the newest client can send and latentrt takes
    "model": "gpt-image-1",
    "n": 1,
    "size": "auto",
    "background": "auto",
    "moderation": "auto",
    "quality": "auto",
    "complexity": "low",
    "output_format": "png",
    "output_compression": 100,
    "response_format": "b64_json",
    "safety_identifier": "someone",
    "user": "somebody",
}


def decoded(data: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(data)))


def test_a_prompt_becomes_pictures(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    answer = client.images.generate(prompt="a red apple", n=3, extra_body={"seed": 7})
    assert answer.data is not None
    assert [image.seed for image in answer.data] == [7, 8, 9]
    assert [decoded(image.b64_json).getpixel((0, 0)) for image in answer.data] == [(k, k, k) for k in (7, 8, 9)]
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert json.loads(decoded(answer.data[2].b64_json).info["latentrt"])["seed"] == 9
    request = scheduler.submitted[0].request
    assert (request.prompt, request.count, request.steps, request.guidance) == ("a red apple", 3, 20, 3.0)
    assert (request.solver, request.negative_prompt) == (None, None)


def test_every_field_of_the_newest_client_is_taken(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    answer = client.images.generate(prompt="a", style="vivid", **EVERYTHING)
    assert answer.safety_identifier == "someone"
    edit = {name: value for name, value in EVERYTHING.items() if name != "moderation"}
    client.images.edit(prompt="a", image=png(), input_fidelity="high", **edit)


def test_no_field_of_the_newest_client_is_unknown() -> None:
    for ours, theirs in ((GenerateRequest, types.ImageGenerateParams), (EditRequest, types.ImageEditParams)):
        known = {field.alias or name for name, field in ours.model_fields.items()}
        for params in get_args(theirs):
            assert set(get_type_hints(params)) <= known


@pytest.mark.parametrize("name", ["n", "size", "model", "quality", "stream", "seed", "svg", "user", "partial_images"])
def test_null_is_the_same_as_nothing(url: str, name: str) -> None:
    assert post(f"{url}/v1/images/generations", json={"prompt": "a", name: None}).status_code == 200


# As their sources send it: routers/images.py of Open WebUI, OpenAIImageTools.js and DALLE3.js of LibreChat, 2026.
OPEN_WEBUI = {"model": "dall-e-2", "prompt": "a", "n": 1, "size": "512x512", "response_format": "b64_json"}
LIBRECHAT = {
    **{"model": "gpt-image-1", "prompt": "a", "n": 1, "background": "auto", "output_format": "png"},
    **{"quality": "auto", "size": "auto"},
}
DALLE3 = {"model": "dall-e-3", "prompt": "a", "n": 1, "quality": "standard", "style": "vivid", "size": "1024x1024"}


def sides(size: str) -> tuple[int, ...]:
    return tuple(map(int, size.split("x")))


@pytest.mark.parametrize("body", [OPEN_WEBUI, LIBRECHAT, DALLE3], ids=["open-webui", "librechat", "librechat-dalle"])
def test_other_clients_draw(url: str, body: dict[str, Any]) -> None:
    answer = post(f"{url}/v1/images/generations?api-version=2025-04-01-preview", json=body)
    (picture,) = answer.json()["data"]
    assert ("url" in picture) == (body is DALLE3)
    assert decoded(picture["b64_json"]).size == ((128, 128) if body is LIBRECHAT else sides(body["size"]))


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("image", {"model": "dall-e-2", "prompt": "a", "n": "1", "size": "512x512", "response_format": "b64_json"}),
        ("image[]", {"model": "gpt-image-1", "prompt": "a", "background": "auto"}),
        ("image[]", {"model": "gpt-image-1", "prompt": "a", "quality": "auto", "size": "auto"}),
    ],
    ids=["open-webui", "open-webui-list", "librechat"],
)
def test_other_clients_edit(url: str, part: str, fields: dict[str, str]) -> None:
    answer = post(f"{url}/v1/images/edits", data=fields, files={part: ("a.png", png(), "image/png")})
    assert answer.status_code == 200, answer.text
    assert set(answer.json()["data"][0]) == {"b64_json", "seed"}


def test_extensions_reach_the_engine(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    own = {"seed": 5, "negative_prompt": "rain", "num_inference_steps": 11, "guidance_scale": 1.5}
    client.images.generate(prompt="a", size="192x64", extra_body={**own, "scheduler": "UniPCMultistepScheduler"})
    client.images.generate(prompt="a", extra_body={"scheduler": "euler-a", "timeout": 9.0})
    first, last = scheduler.submitted
    request, second = first.request, last.request
    assert (request.seed, request.negative_prompt, request.steps, request.guidance) == (5, "rain", 11, 1.5)
    assert (request.solver, request.width, request.height, second.solver) == ("unipc", 192, 64, "euler-ancestral")
    assert (first.shape, first.deadline) == (SPEC.latents.shape_of(64, 192), math.inf)
    assert last.deadline < math.inf


def test_the_bundles_own_scheduler_class_is_the_bundles_own_solver(
    client: openai.OpenAI, scheduler: FakeScheduler
) -> None:
    client.images.generate(prompt="a", extra_body={"scheduler": "DDIMScheduler"})
    assert scheduler.submitted[0].request.solver == "DDIMScheduler"


def test_without_a_seed_every_picture_is_another(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    for _ in range(3):
        client.images.generate(prompt="a")
    assert len({handle.request.seed for handle in scheduler.submitted}) == 3


@pytest.mark.parametrize(
    ("kind", "quality", "pillow"), [("png", None, "PNG"), ("jpeg", 40, "JPEG"), ("webp", None, "WEBP")]
)
def test_output_formats(client: openai.OpenAI, kind: Any, quality: int | None, pillow: str) -> None:
    extra = {} if quality is None else {"output_compression": quality}
    answer = client.images.generate(prompt="a", output_format=kind, response_format="url", **extra)
    assert decoded(answer.data[0].b64_json).format == pillow
    assert answer.data[0].url == f"data:image/{kind};base64,{answer.data[0].b64_json}"


def test_clients_of_the_first_models_find_the_url_they_look_for(client: openai.OpenAI) -> None:
    old, new, plain = (
        client.images.generate(prompt="a", model=model, **extra).data[0].url
        for model, extra in (("dall-e-3", {}), ("gpt-image-1", {}), ("dall-e-3", {"response_format": "b64_json"}))
    )
    assert (old[:22], new, plain) == ("data:image/png;base64,", None, None)


def test_a_prompt_that_is_cut_is_told_to_whoever_wrote_it(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    scheduler.cut = {"prompt": "x" * 999}
    with capture_logs() as log:
        answer = client.images.generate(prompt="a")
        *_, last = client.images.generate(prompt="a", stream=True)
    said = f"prompt is longer than the model reads; it did not read: {'x' * 200}..."
    assert answer.warnings == last.warnings == [said]
    lines = [line for line in log if line["event"] == "request"]
    assert [line["cut"] for line in lines] == [["prompt"]] * 2
    assert "xxx" not in str(log)


def test_a_prompt_may_have_a_syntax(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    client.images.generate(prompt="a cat++", extra_body={"prompt_syntax": "compel"})
    client.images.generate(prompt="a cat++")
    assert [handle.request.prompt_syntax for handle in scheduler.submitted] == ["compel", "plain"]
    with pytest.raises(openai.BadRequestError, match="prompt_syntax"):
        client.images.generate(prompt="a", extra_body={"prompt_syntax": "comfy"})


def test_where_nothing_is_to_be_said_there_are_no_warnings(client: openai.OpenAI) -> None:
    assert "warnings" not in client.images.generate(prompt="a").to_dict()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"background": "transparent"}, "background"),
    ({"output_format": "gif"}, "output_format"),
    ({"output_format": "svg"}, "output_format"),
    ({"svg": {"model": "x"}}, "svg"),
    ({"frame_count": 3}, "frame_count"),
    ({"n": 0}, "n"),
    ({"n": 11}, "n"),
    ({"n": "2"}, "n"),
    ({"n": True}, "n"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": None}, "prompt"),
    ({"prompt": "a" * 40_000}, "prompt"),
    ({"negative_prompt": "a" * 40_000}, "negative_prompt"),
    ({"partial_images": 4}, "partial_images"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64 - 1, "n": 2}, "seed"),
    ({"num_inference_steps": 151}, "num_inference_steps"),
    ({"num_inference_steps": 0}, "num_inference_steps"),
    ({"guidance_scale": 1e9}, "guidance_scale"),
    ({"scheduler": "magic"}, "scheduler"),
    ({"scheduler": "DEISMultistepScheduler"}, "scheduler"),
    ({"output_compression": 50}, "output_compression"),
    ({"steps": 5}, "steps"),
    ({"timeout": 0}, "timeout"),
]


@pytest.mark.parametrize(("change", "param"), REFUSED, ids=[f"{list(change.items())}"[:40] for change, _ in REFUSED])
def test_what_is_not_supported_is_refused_by_name(url: str, change: dict[str, Any], param: str) -> None:
    answer = post(f"{url}/v1/images/generations", json={"prompt": "a", **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_value")
    assert re.search(rf"\b{param}\b", error["message"])
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("size", ["100x100", "8x8", "4096x4096", "2048x2048", "big", "x64", "-64x64", "６４x64"])
def test_unsupported_sizes_list_the_valid_ones(client: openai.OpenAI, size: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt="a", size=size)
    assert (caught.value.param, caught.value.code) == ("size", "unsupported_size")
    assert "128x128, 256x256, 512x512" in str(caught.value)


def test_unknown_models_are_not_found_and_aliases_are(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a", model="gpt-5")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    assert [model.id for model in client.models.list()][:2] == ["emoji", "gpt-image-1"]
    assert client.models.retrieve("dall-e-3").root == "emoji"


def test_streams_have_previews_and_pictures(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    scheduler.delay = 0.01  # time to hear of a preview before the next one
    with client.images.generate(prompt="a", stream=True, partial_images=2, extra_body={"seed": 3}) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]
    assert decoded(events[-1].b64_json).size == (128, 128)
    assert (events[-1].size, events[-1].output_format, events[-1].usage.total_tokens) == ("128x128", "png", 0)
    assert events[-1].seed == 3
    assert scheduler.submitted[0].previews == 2


def test_edits_stream_too(client: openai.OpenAI) -> None:
    wanted: dict[str, Any] = {"prompt": "a", "partial_images": 1, "n": 2, "extra_body": {"seed": 5}}
    events = list(client.images.edit(image=[png(128, 128)], stream=True, **wanted))
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"] * 2
    assert sorted(event.seed for event in events[2:]) == [5, 6]


def test_the_asynchronous_client(url: str) -> None:
    async def ask() -> tuple[int, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
            drawn = await client.images.generate(prompt="a", n=2)
            stream = await client.images.generate(prompt="a", stream=True)
            return len(drawn.data), [event.type async for event in stream]

    assert asyncio.run(ask()) == (2, ["image_generation.completed"])


def test_a_failure_in_a_stream_is_an_event(client: openai.OpenAI, url: str, scheduler: FakeScheduler) -> None:
    scheduler.fails = NetworkError("the latents are not finite", needed="finite numbers", fix="take another solver")
    with pytest.raises(openai.APIError, match="not finite") as caught:
        list(client.images.generate(prompt="a", stream=True))
    assert caught.value.body["code"] == "engine_error"
    answer = post(f"{url}/v1/images/generations", json={"prompt": "a", "stream": True})
    text = answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert text.startswith("event: error\ndata: {")


def test_a_refusal_before_a_stream_is_a_status(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    scheduler.fill()
    with pytest.raises(openai.RateLimitError) as caught:
        client.images.generate(prompt="a", stream=True)
    assert caught.value.code == "queue_full"
    assert caught.value.response.headers["retry-after"] == "1"


def test_heartbeats_keep_a_slow_stream_alive() -> None:
    with live(app_of(FakeScheduler(delay=0.03), heartbeat=0.02)) as url:
        text = post(f"{url}/v1/images/generations", json={"prompt": "a", "stream": True}).text
    assert text.startswith(": ping - ")
    assert "event: image_generation.completed" in text


def test_what_takes_too_long_is_not_tried_again(url: str, scheduler: FakeScheduler) -> None:
    scheduler.fails = QueueTimeout("the picture waited", needed="a shorter queue", fix="order later")
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.images.generate(prompt="a")
    assert (caught.value.status_code, caught.value.code) == (504, "queue_timeout")
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert len(scheduler.submitted) == 1
