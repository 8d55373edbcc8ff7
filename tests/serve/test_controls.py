"""ControlNets on the server: fields of both APIs, by A1111's client too; what is drawn with them; what is refused."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import webuiapi
from PIL import Image, ImageOps

from benchmarks.serving.clients import DRAW, EDIT
from latentrt.bundle.bundle import Bundle
from latentrt.images.hints import blurred, edges, inverted
from latentrt.model.model import Model
from latentrt.runtime.fake import FakeBackend
from tests.serve.test_pixel_models import SD, Server, decoded, serving
from tests.support.serve.fakes import FakeScheduler, app_of, get, live, post

Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:48, :64]
MAP = Image.fromarray(np.stack([4 * x, 5 * y, x * y], axis=-1).astype(np.uint8))


def text_of(image: Image.Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


MAP_TEXT = text_of(MAP)


@pytest.fixture(scope="module")
def served(exported: Exported) -> Iterator[Server]:
    bundle = exported("sd")[1]
    controls = {"edges": exported("control-sd-1")[1], "grey": exported("control-sd-2")[1]}
    yield from serving(bundle, control=controls, ip_adapter={"style": exported("ip-sd-base")[1]})


def test_pictures_are_the_engines(served: Server) -> None:
    """Of both APIs, mixed with those without a ControlNet; and of an edit."""
    asked = {"seed": 3, "steps": 2, "width": 24, "height": 16}
    body = {"prompt": "a cat", "num_inference_steps": 2, "seed": 3, "size": "24x16"}
    units = {"edges": {"image": MAP_TEXT, "scale": 0.7, "end": 0.6}, "grey": {"image": MAP_TEXT, "guess": True}}
    (drawn,) = served.post(DRAW, {**body, "control": units})["data"]
    control = {"edges": {"image": MAP, "scale": 0.7, "end": 0.6}, "grey": {"image": MAP, "guess": True}}
    (expected,) = served.alone("a cat", control=control, **asked)
    np.testing.assert_array_equal(decoded(drawn["b64_json"]), np.asarray(expected))

    unit = {"image": MAP_TEXT, "model": "edges [0a1b2c3d]", "weight": 1.5, "resize_mode": "Just Resize"}
    scripts = {"ControlNet": {"args": [unit, {"enabled": False}]}, "other": {"args": []}}
    answer = served.post(SD, {"prompt": "a cat", **asked, "cfg_scale": 3.0, "alwayson_scripts": scripts})
    (expected,) = served.alone("a cat", control={"edges": {"image": MAP, "scale": 1.5}}, prompt_syntax="a1111", **asked)
    np.testing.assert_array_equal(decoded(answer["images"][0]), np.asarray(expected))

    form = {name: str(value) for name, value in body.items()} | {"control": json.dumps({"edges": {"image": MAP_TEXT}})}
    edited = served.ask("POST", EDIT, data=form, files={"image": base64.b64decode(MAP_TEXT)}).json()
    own = {"image": MAP.resize((24, 16), Image.Resampling.LANCZOS), "strength": 0.8}
    (expected,) = served.alone("a cat", control={"edges": MAP}, **own, **asked)
    np.testing.assert_array_equal(decoded(edited["data"][0]["b64_json"]), np.asarray(expected))


def test_pictures_that_ip_adapters_show(served: Server) -> None:
    """In generations and in edits, which are forms; and what is refused."""
    asked = {"seed": 3, "steps": 2, "width": 24, "height": 16}
    body = {"prompt": "a cat", "num_inference_steps": 2, "seed": 3, "size": "24x16"}
    given = {"style": {"image": MAP_TEXT, "scale": {"up": 0.7}}}
    shown = {"style": {"image": MAP, "scale": {"up": 0.7}}}
    (drawn,) = served.post(DRAW, {**body, "ip_adapter": given})["data"]
    (expected,) = served.alone("a cat", ip_adapter=shown, **asked)
    np.testing.assert_array_equal(decoded(drawn["b64_json"]), np.asarray(expected))

    form = {name: str(value) for name, value in body.items()} | {"ip_adapter": json.dumps(given)}
    edited = served.ask("POST", EDIT, data=form, files={"image": base64.b64decode(MAP_TEXT)}).json()
    own = {"image": MAP.resize((24, 16), Image.Resampling.LANCZOS), "strength": 0.8}
    (expected,) = served.alone("a cat", ip_adapter=shown, **own, **asked)
    np.testing.assert_array_equal(decoded(edited["data"][0]["b64_json"]), np.asarray(expected))

    for wrong, param in (
        ({"other": given["style"]}, "ip_adapter"),
        ({"style": {"image": "no base64"}}, "ip_adapter.style.image"),
        ({"style": {"image": MAP_TEXT, "scale": {"up": "much"}}}, None),
        ({"style": {"image": MAP_TEXT, "scale": {"sideways": 1}}}, None),
    ):
        assert served.refusal(DRAW, {**body, "ip_adapter": wrong})["param"] == param
    assert served.ask("GET", "/latentrt/model").json()["ip_adapters"] == ["style"]


@pytest.fixture
def scheduler() -> FakeScheduler:
    return FakeScheduler()


@pytest.fixture
def url(scheduler: FakeScheduler) -> Iterator[str]:
    yield from served_as("controlnet", scheduler)


def served_as(kind: str, scheduler: FakeScheduler) -> Iterator[str]:
    model = Model(Bundle.open(check_hashes=False), FakeBackend())
    named: Any = SimpleNamespace(name="edges", spec=SimpleNamespace(kind=kind), type_of=lambda control: control.type)
    model.controls = (named,)
    model.ip_adapters = (SimpleNamespace(name="style"),)  # type: ignore[assignment]
    with live(app_of(scheduler, model, controlnet=("edges=some/",))) as url:
        yield url


@pytest.fixture
def api(url: str) -> Iterator[webuiapi.WebUIApi]:
    client = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")
    yield client
    client.session.close()


def test_kinds_are_told(url: str) -> None:
    told = get(f"{url}/latentrt/model").json()
    assert (told["controls"], told["control_kinds"]) == (["edges"], {"edges": "controlnet"})


# The client writes units into its default of alwayson_scripts, for all later calls: each call here gives its own.
def followed(scheduler: FakeScheduler) -> Any:
    return scheduler.submitted[-1].request.control["edges"]


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ({"resize_mode": "Just Resize"}, MAP.resize((64, 64), Image.Resampling.LANCZOS)),
        ({"resize_mode": 1}, ImageOps.fit(MAP, (64, 64), Image.Resampling.LANCZOS)),
        ({}, ImageOps.pad(MAP, (64, 64), Image.Resampling.LANCZOS)),
        (
            {"module": "canny", "threshold_a": 50, "threshold_b": 90, "resize_mode": 0},
            edges(MAP.resize((64, 64), Image.Resampling.LANCZOS), 50, 90),
        ),
        ({"module": "invert", "resize_mode": 1}, inverted(ImageOps.fit(MAP, (64, 64), Image.Resampling.LANCZOS))),
        (
            {"module": "blur_gaussian", "threshold_a": 3, "resize_mode": 0},
            blurred(MAP.resize((64, 64), Image.Resampling.LANCZOS), 3),
        ),
    ],
)
def test_units_of_a1111s_client(
    api: webuiapi.WebUIApi, scheduler: FakeScheduler, unit: dict[str, Any], expected: Image.Image
) -> None:
    own = webuiapi.ControlNetUnit(image=MAP, model="edges", weight=0.8, guidance_end=0.5, control_mode=2, **unit)
    api.txt2img(prompt="a", width=64, height=64, controlnet_units=[own], alwayson_scripts={})
    control = followed(scheduler)
    assert (control.scale, control.start, control.end, control.guess) == (0.8, 0.0, 0.5, True)
    np.testing.assert_array_equal(np.asarray(control.image), np.asarray(expected))


def test_types_of_a_union(scheduler: FakeScheduler) -> None:
    with contextmanager(served_as)("controlnet_union", scheduler) as url:
        for kind, number in (("Hard Edge", 3), ("Inpaint", 7), ("Unknown", None)):
            unit = {"image": MAP_TEXT, "model": "edges", "union_control_type": kind}
            asked = {"prompt": "a", "width": 64, "height": 64, "alwayson_scripts": {"ControlNet": {"args": [unit]}}}
            assert post(f"{url}/sdapi/v1/txt2img", json=asked).is_success
            assert followed(scheduler).type == number
        asked = {"prompt": "a", "size": "64x64", "control": {"edges": {"image": MAP_TEXT, "type": "canny"}}}
        assert post(f"{url}/v1/images/generations", json=asked).is_success
        assert followed(scheduler).type == "canny"


def test_a_unit_of_an_ip_adapter(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    """It has a unit as ControlNets have them, and its picture is shown as it is."""
    own = webuiapi.ControlNetUnit(image=MAP, model="style [0a1b2c3d]", module="ip-adapter_clip_sd15", weight=0.6)
    edge = webuiapi.ControlNetUnit(image=MAP, model="edges")
    api.txt2img(prompt="a", width=64, height=64, controlnet_units=[own, edge], alwayson_scripts={})
    request = scheduler.submitted[-1].request
    assert (request.ip_adapter["style"].scale, list(request.control)) == (0.6, ["edges"])
    np.testing.assert_array_equal(np.asarray(request.ip_adapter["style"].image), np.asarray(MAP))


def test_a_unit_without_a_picture_follows_the_given_one(api: webuiapi.WebUIApi, scheduler: FakeScheduler) -> None:
    """And with a mask whose surroundings alone are drawn, its map is of the whole picture."""
    unit = webuiapi.ControlNetUnit(model="edges")
    api.img2img(images=[MAP], prompt="a", width=64, height=64, controlnet_units=[unit], alwayson_scripts={})
    assert followed(scheduler).image.size == (64, 64)
    mask = Image.new("L", MAP.size, 255)
    api.img2img(
        images=[MAP], mask_image=mask, prompt="a", width=64, height=64, controlnet_units=[unit], alwayson_scripts={}
    )
    assert followed(scheduler).image.size == MAP.size


def test_what_there_is_to_choose_from(api: webuiapi.WebUIApi) -> None:
    assert (api.controlnet_version(), api.controlnet_model_list()) == (2, ["edges", "style"])
    assert {"none", "canny", "tile_resample", "ip-adapter-auto"} <= set(api.controlnet_module_list())
    assert api.get_scripts()["txt2img"] == ["controlnet"]


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ({"model": "pose"}, "there is no model 'pose'. Needed: one of edges"),
        ({"module": "openpose"}, "there is no module 'openpose'"),
        ({"control_mode": 1}, "control_mode is 'My prompt is more important'"),
        ({"control_mode": "x"}, "there is no control_mode 'x'"),
        ({"mask": MAP_TEXT}, "a unit has a mask"),
        ({"hr_option": "High res only"}, "hr_option is 'High res only'"),
        ({"image": ""}, "a unit has no image"),
        ({"weight": -1}, "alwayson_scripts.controlnet.args.0: weight: "),
        ({"image": "AAAA"}, "image cannot be decoded"),
        ({"model": "style", "guidance_end": 0.5}, "an IP-Adapter acts from 0 to 0.5"),
        ({"model": "style", "control_mode": 2}, "control_mode is 'ControlNet is more important'"),
        ({"model": "style", "module": "canny"}, "there is no module 'canny'"),
    ],
)
def test_units_that_are_refused(url: str, unit: dict[str, Any], message: str) -> None:
    body = {
        "prompt": "a",
        "alwayson_scripts": {"controlnet": {"args": [{"model": "edges", "image": MAP_TEXT, **unit}]}},
    }
    api = webuiapi.WebUIApi(baseurl=f"{url}/sdapi/v1")
    answer = api.session.post(f"{url}{SD}", json=body)
    api.session.close()
    assert answer.status_code == 400
    assert message in answer.text


def test_other_scripts_are_refused(api: webuiapi.WebUIApi) -> None:
    with pytest.raises(RuntimeError, match=r"there is a script .*adetailer.*controlnet"):
        api.txt2img(prompt="a", alwayson_scripts={"adetailer": {"args": [True]}})
