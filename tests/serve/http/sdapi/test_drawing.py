"""A1111's API as its clients use it."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.serve.fakes import EMOJI, ROWS, FakeScheduler, app_of, png, until

# What Open WebUI and LibreChat send, and what SillyTavern adds.
OPEN_WEBUI = {"prompt": "a cat", "batch_size": 2, "width": 512, "height": 512, "steps": 10, "negative_prompt": "dog"}
LIBRECHAT = {"prompt": "a", "negative_prompt": "b", "cfg_scale": 4.5, "steps": 22, "width": 1024, "height": 1024}
SILLYTAVERN = {
    **{"prompt": "a", "sampler_name": "DPM++ 2M", "scheduler": "karras", "restore_faces": False, "enable_hr": False},
    **{"clip_skip": 1, "send_images": True, "save_images": False, "do_not_save_grid": False, "denoising_strength": 0.7},
    **{"override_settings": {"CLIP_stop_at_last_layers": 1}, "override_settings_restore_afterwards": True},
}

Client = httpx.AsyncClient


def using(app: Any, work: Callable[[Client], Awaitable[Any]], **headers: str) -> Any:
    async def go() -> Any:
        transport = httpx.ASGITransport(app)
        async with Client(transport=transport, base_url="http://localhost/sdapi/v1", headers=headers) as client:
            return await work(client)

    return asyncio.run(go())


def post(app: Any, path: str, body: dict[str, Any]) -> httpx.Response:
    return using(app, lambda client: client.post(path, json=body))


@pytest.mark.parametrize("body", [OPEN_WEBUI, LIBRECHAT, SILLYTAVERN], ids=["open-webui", "librechat", "sillytavern"])
def test_what_clients_send_is_drawn(app: Any, scheduler: FakeScheduler, body: dict[str, Any]) -> None:
    answer = post(app, "txt2img", body).json()
    images = [Image.open(BytesIO(base64.b64decode(image))) for image in answer["images"]]
    request = scheduler.submitted[0].request
    assert len(images) == request.count == body.get("batch_size", 1)
    assert {image.size for image in images} == {(body.get("width", 128), body.get("height", 128))}
    assert (request.steps, request.guidance) == (body.get("steps", 20), body.get("cfg_scale", 3.0))
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [request.seed + index for index in range(request.count)]
    assert info["infotexts"][0].endswith(f"Seed: {request.seed}, Size: {info['width']}x{info['height']}")


@pytest.mark.parametrize(
    ("asked", "solver", "options"),
    [
        ({}, None, {}),
        ({"sampler_name": "Euler a"}, "euler-ancestral", {}),
        ({"sampler_index": "Euler"}, "euler", {}),
        ({"sampler_name": "DPM++ 2M"}, "dpmpp-2m", {"use_karras_sigmas": True}),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Uniform"}, "dpmpp-2m", {}),
        ({"sampler_name": "DPM++ 2M Karras"}, "dpmpp-2m", {"use_karras_sigmas": True}),
        ({"sampler_name": "Euler", "scheduler": "exponential"}, "euler", {"use_exponential_sigmas": True}),
        ({"sampler_name": "DDIM", "eta": 0.5}, "ddim", {"eta": 0.5}),
        ({"sampler_name": "Euler", "eta": 0.5}, "euler", {}),
        ({"sampler_name": "unipc-3"}, "unipc-3", {}),
    ],
)
def test_samplers_by_their_names_there(
    app: Any, scheduler: FakeScheduler, asked: dict[str, Any], solver: str | None, options: dict[str, Any]
) -> None:
    assert post(app, "txt2img", {"prompt": "a", **asked}).status_code == 200
    assert (scheduler.submitted[0].request.solver, scheduler.submitted[0].request.options) == (solver, options)


def test_every_sampler_listed_is_drawn_with(app: Any) -> None:
    names = [one["name"] for one in using(app, lambda client: client.get("samplers")).json()]
    assert {"Euler a", "DPM++ 2M", "dpmpp-3m"} <= set(names)
    assert {post(app, "txt2img", {"prompt": "a", "sampler_name": name}).status_code for name in names} == {200}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler"),
        ({"enable_hr": True, "hr_scale": 20}, "hr_scale"),
        ({"enable_hr": True, "hr_scale": 8, "width": 512, "height": 512}, "hr_scale"),
        ({"enable_hr": True, "hr_second_pass_steps": 1000}, "hr_second_pass_steps"),
        ({"enable_hr": True, "hr_resize_x": 512}, "hr_resize_x"),
        ({"refiner_checkpoint": "another"}, "refiner_checkpoint"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 0}}, "CLIP_stop_at_last_layers"),
        ({"override_settings": {"sd_vae": "other.pt"}}, "sd_vae"),
        ({"styles": ["x"]}, "styles"),
        ({"alwayson_scripts": {"adetailer": {"args": [1]}}}, "alwayson_scripts"),
        ({"tiling": True}, "tiling"),
        ({"width": 100}, "width"),
        ({"batch_size": 6, "n_iter": 2}, "batch_size"),
        ({"steps": 1000}, "steps"),
        ({"sampler_name": "magic"}, "sampler_name"),
        ({"scheduler": "magic"}, "scheduler"),
        ({"sampler_name": "DDIM", "scheduler": "Karras"}, "scheduler"),
        ({"cfg_scale": -1}, "cfg_scale"),
        ({"steps": "nine"}, "steps"),
        ({"eta": 1.5}, "eta"),
        ({"s_churn": 0.5}, "s_churn"),
        ({"firstphase_width": 64}, "firstphase_width"),
        ({"override_settings": {"eta_noise_seed_delta": "x"}}, "eta_noise_seed_delta"),
        ({"override_settings": {"token_merging_ratio": 0.5}}, "token_merging_ratio"),
        ({"override_settings": {"samples_format": "avif"}}, "samples_format"),
    ],
)
def test_what_is_not_offered_is_refused_by_name(app: Any, body: dict[str, Any], param: str) -> None:
    answer = post(app, "txt2img", {"prompt": "a", **body})
    assert (answer.status_code in (400, 422), answer.json()["param"]) == (True, param)
    assert {"error", "detail", "errors", "body"} < set(answer.json())


def test_hires_fix_is_asked_for_as_there(app: Any, scheduler: FakeScheduler) -> None:
    body = {"prompt": "a", "enable_hr": True, "hr_scale": 1.5, "hr_upscaler": "Latent", "denoising_strength": 0.4}
    assert post(app, "txt2img", {**body, "hr_second_pass_steps": 7, "width": 64, "height": 96}).status_code == 200
    assert post(app, "txt2img", {"prompt": "a", "enable_hr": True}).status_code == 200
    assert post(app, "txt2img", {**body, "enable_hr": False}).status_code == 200
    own, usual, without = (handle.request for handle in scheduler.submitted)
    assert (own.hires_scale, own.hires_steps, own.hires_strength, own.strength) == (1.5, 7, 0.4, None)
    assert (usual.hires_scale, usual.hires_steps, usual.hires_strength) == (2.0, None, 0.75)
    assert without.hires_scale is None
    assert [handle.shape for handle in scheduler.submitted][:2] == [(4, 18, 12), (4, 32, 32)]


def test_pictures_are_edited(app: Any, scheduler: FakeScheduler) -> None:
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    image, area = (base64.b64encode(data).decode() for data in (png(64, 64, colour="red"), buffer.getvalue()))
    body = {"prompt": "a", "init_images": [f"data:image/png;base64,{image}"], "denoising_strength": 0.5}
    body |= {"mask": area, "width": 64, "height": 64}
    assert post(app, "img2img", body).status_code == 200
    assert post(app, "img2img", {**body, "inpainting_mask_invert": 1}).status_code == 200
    plain, inverted = (handle.request for handle in scheduler.submitted)
    repainted = np.asarray(plain.pictures["mask"])
    assert plain.strength == 0.5
    assert (np.asarray(plain.pictures["image"]) == [255, 0, 0]).all()
    assert (repainted[:, :32] == 255).all()
    assert (repainted[:, 32:] == 0).all()
    assert (np.asarray(inverted.pictures["mask"]) == 255 - repainted).all()


def test_pictures_of_sixteen_bits_are_edited(app: Any, scheduler: FakeScheduler) -> None:
    """A mask of 4.6 % grey repaints nothing; PIL's own conversion to 8 bits made it white."""
    mask = Image.new("I;16", (64, 64), 3000)
    mask.paste(65535, (0, 0, 32, 64))
    picture, area = BytesIO(), BytesIO()
    Image.new("I;16", (64, 64), 300).save(picture, "PNG")
    mask.save(area, "PNG")
    sent, repainted = (base64.b64encode(buffer.getvalue()).decode() for buffer in (picture, area))
    body = {"prompt": "a", "init_images": [sent], "mask": repainted, "width": 64, "height": 64}
    assert post(app, "img2img", body).status_code == 200
    image, area = (np.asarray(scheduler.submitted[0].request.pictures[name]) for name in ("image", "mask"))
    assert (image == 1).all()
    assert (area[:, :32] == 255).all()
    assert (area[:, 32:] < 128).all()


@pytest.mark.parametrize(
    ("images", "code"),
    [
        (["http://example.org/a.png"], "invalid_value"),
        (["file:///etc/passwd"], "invalid_value"),
        (["#"], "image_decode_failed"),
        ([base64.b64encode(b"no picture").decode()], "image_decode_failed"),
        ([], "invalid_value"),
        (["", ""], "invalid_value"),
    ],
)
def test_bad_pictures_are_refused(app: Any, images: list[str], code: str) -> None:
    answer = post(app, "img2img", {"prompt": "a", "init_images": images})
    error = answer.json()
    assert (answer.status_code in (400, 422), error["param"], error["code"]) == (True, "init_images", code)


def test_a_model_that_repaints_needs_a_mask(scheduler: FakeScheduler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(EMOJI), "pictures", ("image", "mask"))
    image = base64.b64encode(png()).decode()

    async def work(client: Client) -> list[httpx.Response]:
        bodies = {"init_images": [image]}, {"init_images": [image], "mask": image}
        return [
            await client.post("/txt2img", json={"prompt": "a"}),
            *[await client.post("/img2img", json={"prompt": "a", **body}) for body in bodies],
        ]

    answers = using(app_of(scheduler), work)
    assert [answer.status_code for answer in answers] == [400, 400, 200]
    assert ["there is no picture" in answers[0].text, "there is no mask" in answers[1].text] == [True, True]


def test_options_name_the_model_and_choose_it(app: Any) -> None:
    options = using(app, lambda client: client.get("options")).json()
    assert options["sd_model_checkpoint"] == "emoji"
    assert post(app, "options", options).status_code == 200
    assert post(app, "options", {"sd_model_checkpoint": "gpt-image-1"}).status_code == 200
    answer = post(app, "options", {"sd_model_checkpoint": "other"})
    assert (answer.status_code, answer.json()["code"]) == (404, "model_not_found")
    models = using(app, lambda client: client.get("sd-models")).json()
    assert [(model["title"], model["model_name"]) for model in models] == [("emoji", "emoji")]
    schedulers = using(app, lambda client: client.get("schedulers")).json()
    assert {"name": "karras", "label": "Karras"} in schedulers


def test_progress_by_task(scheduler: FakeScheduler, app: Any) -> None:
    async def work(client: Client) -> None:
        idle = (await client.get("progress")).json()
        assert (idle["progress"], idle["state"]["job_count"]) == (0, 0)
        scheduler.hold = asyncio.Event()
        tasks = [
            asyncio.create_task(client.post("txt2img", json={"prompt": "a", "force_task_id": name, "steps": ROWS}))
            for name in ("first", "second")
        ]
        await until(lambda: [one.shown is not None and one.row for one in scheduler.handles] == [1, 1])
        known = (await client.get("progress", params={"id_task": "second"})).json()
        assert known["state"]["job"] == "second"
        assert known["progress"] == 1 / ROWS
        assert (known["state"]["sampling_step"], known["state"]["sampling_steps"]) == (1, ROWS)
        assert known["eta_relative"] > 0
        assert Image.open(BytesIO(base64.b64decode(known["current_image"]))).size == (128, 128)
        bare = await client.get("progress", params={"id_task": "second", "skip_current_image": True})
        assert bare.json()["current_image"] is None
        unknown = await client.get("progress", params={"id_task": "third"})
        assert unknown.json()["state"]["job_count"] == 0
        scheduler.hold.set()
        assert [answer.status_code for answer in await asyncio.gather(*tasks)] == [200, 200]

    using(app, work)


def test_interrupting_ends_ones_own_alone() -> None:
    scheduler = FakeScheduler()
    app = app_of(scheduler, keys=("mine", "theirs"))

    async def work(client: Client) -> None:
        scheduler.hold = asyncio.Event()
        mine, theirs = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
        tasks = [
            asyncio.create_task(client.post("txt2img", json={"prompt": "a"}, headers=key)) for key in (mine, theirs)
        ]
        tasks.append(asyncio.create_task(client.post("http://localhost/v1/images/generations", json={"prompt": "a"})))
        await until(lambda: [one.row for one in scheduler.handles] == [1, 1, 1])
        assert (await client.post("interrupt")).status_code == 200
        ended = await tasks[0]
        assert (ended.status_code, len(ended.json()["images"])) == (200, 1)
        scheduler.hold.set()
        assert [(await task).status_code for task in tasks[1:]] == [200, 200]

    using(app, work, authorization="Bearer mine")


def test_without_keys_an_address_is_an_owner(app: Any, scheduler: FakeScheduler) -> None:
    async def work() -> None:
        scheduler.hold = asyncio.Event()
        transports = [httpx.ASGITransport(app, client=(address, 1)) for address in ("10.0.0.1", "10.0.0.2")]
        mine, theirs = (Client(transport=one, base_url="http://localhost/sdapi/v1") for one in transports)
        tasks = [asyncio.create_task(client.post("txt2img", json={"prompt": "a"})) for client in (mine, theirs)]
        await until(lambda: [one.row for one in scheduler.handles] == [1, 1])
        assert (await mine.post("interrupt")).status_code == 200
        assert len((await tasks[0]).json()["images"]) == 1
        scheduler.hold.set()
        assert (await tasks[1]).status_code == 200

    asyncio.run(work())
