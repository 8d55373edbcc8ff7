"""Edits by the Images API: files become arrays of the request, once it has its places."""

from __future__ import annotations

import base64
from io import BytesIO

import openai
import pytest
from PIL import Image

from tests.serve.http.test_openai import decoded
from tests.support.serve.fakes import FakeScheduler, app_of, live, png, post


def test_edits_decode_to_arrays(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    mask = Image.new("RGBA", (128, 128), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (0, 0, 64, 128))
    buffer = BytesIO()
    mask.save(buffer, "PNG")
    image = png(128, 128, colour="red")
    answer = client.images.edit(prompt="a", image=image, mask=buffer.getvalue(), extra_body={"strength": 0.5})
    request = scheduler.submitted[0].request
    given, area = request.pictures["image"], request.pictures["mask"]
    assert given.shape == (128, 128, 3)
    assert (given == [255, 0, 0]).all()
    assert (area[:, :64] == 255).all()
    assert (area[:, 64:] == 0).all()
    assert (request.strength, request.steps) == (0.5, 20)
    assert decoded(answer.data[0].b64_json).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(("value", "level"), [(300, 1), (32768, 128), (65535, 255)])
def test_edits_of_sixteen_bits_are_scaled(
    client: openai.OpenAI, scheduler: FakeScheduler, value: int, level: int
) -> None:
    buffer = BytesIO()
    Image.new("I;16", (64, 64), value).save(buffer, "PNG")
    client.images.edit(prompt="a", image=buffer.getvalue())
    assert (scheduler.submitted[0].request.pictures["image"] == level).all()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_edits_keep_the_shape_of_the_picture(client: openai.OpenAI, scheduler: FakeScheduler, kind: str) -> None:
    client.images.edit(prompt="a", image=[png(400, 100, kind=kind)])
    assert scheduler.submitted[0].request.pictures["image"].shape == (64, 256, 3)
    client.images.edit(prompt="a", image=png(400, 100, kind=kind), size="64x64")
    assert scheduler.submitted[1].request.pictures["image"].shape == (64, 64, 3)


@pytest.mark.parametrize(
    ("files", "data", "param", "code"),
    [
        ([("image", b"no picture")], {}, "image", "image_decode_failed"),
        ([("image", png(kind="GIF"))], {}, "image", "image_decode_failed"),
        ([("image", png()[:60])], {}, "image", "image_decode_failed"),
        ([("image", png()), ("mask", b"no picture")], {}, "mask", "image_decode_failed"),
        ([("image", png()), ("mask", png())], {}, "mask", "invalid_value"),
        ([("image", png()), ("mask", png(32, 64, "RGBA"))], {}, "mask", "invalid_value"),
        ([("image", png()), ("image[]", png())], {}, "image[]", "invalid_value"),
        ([("mask", png())], {}, "image", "invalid_value"),
        ([("mask", png())], {"image": "https://example.org/a.png"}, "image", "invalid_value"),
        ([("image", png()), ("markup", png())], {}, "markup", "invalid_value"),
        ([("image", png())], {"svg[model]": "x"}, "svg[model]", "invalid_value"),
        ([("image", png())], {"strength": "0"}, "strength", "invalid_value"),
    ],
)
def test_bad_edits_are_refused(
    url: str, scheduler: FakeScheduler, files: list[tuple[str, bytes]], data: dict[str, str], param: str, code: str
) -> None:
    parts = [(name, ("file", content)) for name, content in files]
    answer = post(f"{url}/v1/images/edits", data={"prompt": "a", **data}, files=parts)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, code)
    assert scheduler.waiting == 0


def test_a_server_may_edit_nothing() -> None:
    scheduler = FakeScheduler()
    with live(app_of(scheduler, edits=False)) as url:
        answer = post(f"{url}/v1/images/edits", data={"prompt": "a"}, files={"image": ("a", png())})
        body = {"prompt": "a", "init_images": [base64.b64encode(png()).decode()]}
        other = post(f"{url}/sdapi/v1/img2img", json=body)
    assert [one.status_code for one in (answer, other)] == [400, 400]
    assert [answer.json()["error"]["param"], other.json()["param"]] == ["image", "init_images"]
    assert scheduler.seen == []


def test_pictures_with_too_many_pixels_are_never_decoded() -> None:
    scheduler = FakeScheduler()
    bomb = png(3000, 3000, "1")
    assert len(bomb) < 4000
    with live(app_of(scheduler, max_image_pixels=2**20, max_image_bytes=5000)) as url:
        for files, status, code in (
            ({"image": ("a", bomb)}, 400, "image_decode_failed"),
            ({"image": ("a", b"x" * 6000)}, 413, "image_too_large"),
        ):
            answer = post(f"{url}/v1/images/edits", data={"prompt": "a"}, files=files)
            assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert scheduler.submitted == []


def clear(colour: tuple[int, int, int, int], box: tuple[int, int, int, int] | None) -> bytes:
    image = Image.new("RGBA", (64, 64), (255, 0, 0, 255))
    if box is not None:
        image.paste(colour, box)
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "masked"),
    [
        (clear((0, 0, 0, 0), (0, 0, 32, 64)), True),
        (clear((0, 0, 0, 200), (0, 0, 32, 64)), False),  # more there than not
        (clear((0, 0, 0, 0), None), False),
        (png(64, 64), False),
    ],
)
def test_without_a_mask_a_pictures_alpha_is_one(
    client: openai.OpenAI, scheduler: FakeScheduler, image: bytes, masked: bool
) -> None:
    client.images.edit(prompt="a", image=image, size="64x64")
    request = scheduler.submitted[-1].request
    assert ("mask" in request.pictures) is masked
    if masked:
        assert (request.pictures["mask"][:, :31] == 255).all()
        assert (request.pictures["mask"][:, 33:] == 0).all()
    assert request.strength in ((None, 1.0) if masked else (None, 0.8))
    opaque = Image.new("RGBA", (64, 64), (0, 0, 0, 255))
    opaque.paste((0, 0, 0, 0), (0, 0, 64, 32))
    buffer = BytesIO()
    opaque.save(buffer, "PNG")
    client.images.edit(prompt="a", image=image, mask=buffer.getvalue(), size="64x64")
    assert (scheduler.submitted[-1].request.pictures["mask"][:31] == 255).all()


def test_several_pictures_are_refused_by_name(client: openai.OpenAI, scheduler: FakeScheduler) -> None:
    with pytest.raises(openai.BadRequestError, match=r"image\[\] has 2 pictures. Needed: one") as caught:
        client.images.edit(prompt="a", image=[png(), png()])
    assert (caught.value.param, scheduler.seen) == ("image[]", [])


def test_other_apis_names_are_told_ours(client: openai.OpenAI) -> None:
    for name, ours in (("steps", "num_inference_steps"), ("cfg_scale", "guidance_scale"), ("width", "size")):
        words = f"{name} is not a parameter here; did you mean {ours}"
        with pytest.raises(openai.BadRequestError, match=words):
            client.images.generate(prompt="a", extra_body={name: 5})
        with pytest.raises(openai.BadRequestError, match=words):
            client.images.edit(prompt="a", image=png(), extra_body={name: 5})


def test_usage_is_always_told(client: openai.OpenAI) -> None:
    for answer in (client.images.generate(prompt="a"), client.images.edit(prompt="a", image=png())):
        assert answer.usage is not None
        assert (answer.usage.total_tokens, answer.usage.input_tokens_details.text_tokens) == (0, 0)
