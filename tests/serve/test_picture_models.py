"""Models that read a given picture beside the latents, or its depth map, served whole by both APIs; and LCM."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.serving.clients import DRAW, EDIT
from latentrt import Engine
from latentrt.errors import RequestError
from tests.serve.test_pixel_models import SD, Server, decoded, serving
from tests.support.serve.fakes import catalog_of

Exported = Callable[[str], tuple[Path, Path]]
IMG2IMG = "/sdapi/v1/img2img"
y, x = np.mgrid[:14, :19] / 19
PICTURE = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
DEPTH = Image.fromarray((np.hypot(*np.mgrid[-5:6:33j, -3:8:29j]) * 4096).astype(np.uint16))
FIELDS = {"prompt": "a cat", "num_inference_steps": "2", "seed": "3"}
ASKED: dict[str, Any] = {"steps": 2, "seed": 3}
TOLD = ("negative_prompt", "image_guidance", "noise_level", "strength", "masks")
NEEDED = ("needs_picture", "needs_mask", "needs_depth", "enlarges")


@pytest.fixture(scope="module")
def pix2pix(exported: Exported) -> Iterator[Server]:
    yield from serving(exported("pix2pix")[1])


@pytest.fixture(scope="module")
def depth(exported: Exported) -> Iterator[Server]:
    yield from serving(exported("depth")[1])


@pytest.fixture(scope="module")
def x4(exported: Exported) -> Iterator[Server]:
    yield from serving(exported("x4")[1])


@pytest.fixture(scope="module")
def lcm(exported: Exported) -> Iterator[Server]:
    yield from serving(exported("lcm")[1])


def file_of(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def edit(server: Server, fields: dict[str, str], status: int = 200, **pictures: Image.Image) -> Any:
    answer = server.ask("POST", EDIT, data={**FIELDS, **fields}, files={k: file_of(v) for k, v in pictures.items()})
    assert answer.status_code == status, answer.text
    return decoded(answer.json()["data"][0]["b64_json"]) if status == 200 else answer.json()["error"]


def img2img(fields: dict[str, Any]) -> dict[str, Any]:
    images = [base64.b64encode(file_of(PICTURE)).decode()]
    return {"prompt": "a cat", "steps": 2, "seed": 3, "init_images": images, **fields}


def drawn(server: Server, **settings: Any) -> Any:
    return np.asarray(server.alone("a cat", **ASKED, **settings)[0])


def told(server: Server, names: tuple[str, ...]) -> list[Any]:
    known = server.ask("GET", "/latentrt/model").json()
    return [known[name] for name in names]


@pytest.mark.parametrize(
    ("fields", "settings"),
    [
        ({}, {}),
        ({"noise_level": "40", "size": "32x40"}, {"noise_level": 40, "width": 32, "height": 40}),
    ],
)
def test_an_upscaler_gets_the_picture_at_its_own_size(
    x4: Server, fields: dict[str, str], settings: dict[str, Any]
) -> None:
    """19 by 14 pixels are read as 16 by 12, and drawn four times as large."""
    expected = drawn(x4, image=PICTURE, **settings)
    assert expected.shape[:2] == ((40, 32) if settings else (48, 64))
    np.testing.assert_array_equal(edit(x4, fields, image=PICTURE), expected)
    sides = {name: settings[name] for name in ("width", "height", "noise_level") if name in settings}
    (file,) = x4.post(IMG2IMG, img2img(sides))["images"]
    asked = {**settings, "prompt_syntax": "a1111"}
    np.testing.assert_array_equal(decoded(file), drawn(x4, image=PICTURE, **asked))


def test_extras_enlarge_by_the_served_model(x4: Server) -> None:
    name = x4.ask("GET", "/sdapi/v1/sd-models").json()[0]["title"]
    upscalers = {one["name"]: one["scale"] for one in x4.ask("GET", "/sdapi/v1/upscalers").json()}
    assert upscalers == {"None": 1, "Lanczos": 1, "Nearest": 1, name: 4}
    body = {"image": base64.b64encode(file_of(PICTURE)).decode(), "upscaler_1": name, "upscaling_resize": 4}
    answer = x4.post("/sdapi/v1/extra-single-image", body)
    assert decoded(answer["image"]).shape == (56, 72, 3)  # of 19 by 14, in eights
    assert name in answer["html_info"]


def test_an_upscalers_pictures_count_as_they_are_drawn(x4: Server) -> None:
    large = Image.new("RGB", (520, 20))
    error = edit(x4, {}, 400, image=large)
    assert (error["code"], error["param"]) == ("unsupported_size", "size")
    assert "the picture is 520x20, and drawn as 2080x80" in error["message"]
    sent = {"init_images": [base64.b64encode(file_of(large)).decode()]}
    assert x4.refusal(IMG2IMG, img2img(sent))["param"] == "width"
    catalog = catalog_of(x4.alone.model, sizes=("64x48",))
    assert catalog.sizes.fitting(19, 14) == (64, 48)
    with pytest.raises(RequestError, match=r"drawn as 80x48.*Needed: 64x48"):
        catalog.sizes.fitting(20, 14)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"noise_level": "351"}, "noise_level is 351"),
        ({"strength": "0.5"}, "strength is 0.5"),
        ({"image_guidance": "2"}, "reads no image_guidance"),
    ],
)
def test_what_an_upscaler_does_not_read_is_refused(x4: Server, fields: dict[str, str], words: str) -> None:
    assert words in edit(x4, fields, 400, image=PICTURE)["message"]
    error = edit(x4, {}, 400, image=PICTURE, mask=PICTURE.convert("RGBA"))
    assert (error["param"], error["message"].startswith("there is a mask. Needed: none")) == ("mask", True)


def test_pictures_are_edited_as_told(pix2pix: Server) -> None:
    fields = {"image_guidance": "2.5", "size": "64x64", "guidance_scale": "4"}
    expected = drawn(pix2pix, image=PICTURE, image_guidance=2.5, guidance=4.0, width=64, height=64)
    np.testing.assert_array_equal(edit(pix2pix, fields, image=PICTURE), expected)
    assert "reads no noise_level" in edit(pix2pix, {"noise_level": "3"}, 400, image=PICTURE)["message"]


def test_a1111s_clients_always_send_a_strength_and_an_image_guidance(pix2pix: Server) -> None:
    asked: dict[str, Any] = {"width": 64, "height": 64, "cfg_scale": 4}
    settings: dict[str, Any] = {"width": 64, "height": 64, "guidance": 4, "prompt_syntax": "a1111"}
    usual = drawn(pix2pix, image=PICTURE, image_guidance=1.5, **settings)
    for sent in ({}, {"denoising_strength": 0.75, "image_cfg_scale": 1.5}, {"denoising_strength": 1}):
        answer = pix2pix.post(IMG2IMG, img2img({**asked, **sent}))
        np.testing.assert_array_equal(decoded(answer["images"][0]), usual)
        assert json.loads(answer["info"])["denoising_strength"] is None
    (file,) = pix2pix.post(IMG2IMG, img2img({**asked, "image_cfg_scale": 2.5}))["images"]
    np.testing.assert_array_equal(decoded(file), drawn(pix2pix, image=PICTURE, image_guidance=2.5, **settings))
    pix2pix.post(IMG2IMG, img2img({**asked, "cfg_scale": 1, "image_cfg_scale": 1.5}))
    error = pix2pix.refusal(IMG2IMG, img2img({**asked, "cfg_scale": 1, "image_cfg_scale": 2}))
    assert error["message"].startswith("image_cfg_scale is 2 and cfg_scale 1. Needed: cfg_scale above 1")
    error = pix2pix.refusal(IMG2IMG, img2img({**asked, "denoising_strength": 0.4}))
    assert (error["param"], "denoising_strength is 0.4" in error["message"]) == ("denoising_strength", True)


def test_a_depth_map_comes_beside_the_picture(depth: Server) -> None:
    fields = {"size": "64x72", "strength": "0.6"}
    expected = drawn(depth, image=PICTURE, depth=DEPTH, width=64, height=72, strength=0.6)
    np.testing.assert_array_equal(edit(depth, fields, image=PICTURE, depth=DEPTH), expected)
    for wrong, words in ((PICTURE, "has colours"), (None, "there is no depth map. Needed: a picture and a depth map")):
        error = edit(depth, {}, 400, image=PICTURE, **({} if wrong is None else {"depth": wrong}))
        assert (error["param"], words in error["message"]) == ("depth", True)
    for body, param in ((img2img({}), "depth"), ({"prompt": "a"}, "init_images")):
        error = depth.refusal(IMG2IMG if "init_images" in body else SD, body)
        assert error["param"] == param
    assert "/v1/images/edits" in depth.refusal(IMG2IMG, img2img({}))["message"]


def test_other_models_read_none_of_these(lcm: Server) -> None:
    error = edit(lcm, {}, 400, image=PICTURE, depth=DEPTH)
    assert (error["param"], "there is a depth map" in error["message"]) == ("depth", True)
    assert lcm.refusal(IMG2IMG, img2img({"image_cfg_scale": 2}))["param"] == "image_cfg_scale"
    assert "noise_level" in lcm.refusal(IMG2IMG, img2img({"noise_level": 2}))["message"]
    lcm.post(IMG2IMG, img2img({"image_cfg_scale": 1.5, "width": 64, "height": 64}))
    assert lcm.refusal(DRAW, {"prompt": "a", "noise_level": 3})["param"] == "noise_level"


def test_what_may_be_offered(pix2pix: Server, depth: Server, x4: Server, lcm: Server) -> None:
    assert told(pix2pix, NEEDED) == [True, False, False, None]
    assert told(depth, NEEDED) == [True, False, True, None]
    assert told(x4, NEEDED) == [True, False, False, 4]
    assert told(lcm, NEEDED) == [False, False, False, None]
    assert told(pix2pix, TOLD) == [True, True, False, False, False]
    assert told(depth, TOLD) == [True, False, False, True, True]
    assert told(x4, TOLD) == [True, False, True, False, False]
    assert told(lcm, TOLD) == [False, False, False, True, True]
    known = x4.ask("GET", "/latentrt/model").json()
    assert (known["limits"]["max_noise_level"], known["defaults"]["image_guidance"]) == (350, None)
    assert pix2pix.ask("GET", "/latentrt/model").json()["defaults"]["image_guidance"] == 1.5


def test_a_model_of_pictures_is_not_served_without_edits(exported: Exported) -> None:
    with (
        Engine.load(exported("x4")[1], threads=1, check_hashes=False) as engine,
        pytest.raises(RequestError, match=r"edits is off, .* draws on pictures.*leave --no-edits out"),
    ):
        catalog_of(engine.model, edits=False)
