"""Models that read no prompt and have no VAE, served whole: both APIs, previews, classes, edits."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from benchmarks.serving.clients import DRAW, EDIT
from latentrt import Engine
from latentrt.bundle.spec import LatentSpec
from latentrt.errors import RequestError
from latentrt.images.given import prepared
from latentrt.request import Request
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.serve.core.handle import Handle, Slot
from latentrt.serve.core.service import Service
from latentrt.serve.http.app import create_app
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.http.images import File, decode
from latentrt.serve.process.config import Settings
from tests.serve.conftest import eventually
from tests.support.gpu.host_gpu import HostGpu
from tests.support.serve.fake_engine import submit, wait
from tests.support.serve.fakes import catalog_of, png

Exported = Callable[[str], tuple[Path, Path]]
SD = "/sdapi/v1/txt2img"
STEPS = 4


class Server:
    """A service over a bundle, asked in this process.

    Attributes:
        alone: another engine of the same bundle.
    """

    def __init__(self, service: Service, served: Engine, alone: Engine) -> None:
        self.scheduler, self.alone = service.scheduler, alone
        self._app = create_app(
            service.scheduler, Catalog(served.model, served.model.profiles(served.denoiser.lanes), Settings())
        )

    def ask(self, method: str, path: str, **named: Any) -> httpx.Response:
        async def go() -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(self._app), base_url="http://localhost"
            ) as client:
                return await client.request(method, path, **named)

        return asyncio.run(go())

    def post(self, path: str, body: dict[str, Any]) -> Any:
        answer = self.ask("POST", path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refusal(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.ask("POST", path, json=body)
        assert answer.status_code == 400, answer.text
        body = answer.json()
        return {**body, "message": body["errors"]} if path.startswith("/sdapi") else dict(body["error"])


def serving(bundle: str | Path, **loading: Any) -> Iterator[Server]:
    with (
        Engine.load(bundle, threads=1, check_hashes=False, **loading) as served,
        Engine.load(bundle, threads=1, check_hashes=False, **loading) as alone,
        Service(served) as service,
    ):
        eventually(lambda: service.scheduler.ready)
        yield Server(service, served, alone)


@pytest.fixture(scope="module")
def pixels() -> Iterator[Server]:
    yield from serving("pixels")


@pytest.fixture(scope="module")
def classes(exported: Exported) -> Iterator[Server]:
    yield from serving(exported("classes")[1])


def decoded(file: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(BytesIO(base64.b64decode(file))))


@pytest.mark.parametrize("texts", [{}, {"prompt": "", "negative_prompt": ""}])
def test_the_webui_api_draws_without_a_prompt(pixels: Server, texts: dict[str, str]) -> None:
    answer = pixels.post(SD, {**texts, "steps": STEPS, "seed": 5, "batch_size": 2})
    expected = pixels.alone(steps=STEPS, seed=5, count=2)
    np.testing.assert_array_equal([decoded(file) for file in answer["images"]], [*map(np.asarray, expected)])
    info = json.loads(answer["info"])
    assert (info["prompt"], info["all_prompts"], info["sampler_name"]) == ("", ["", ""], "ddpm")
    assert (info["width"], info["height"], info["cfg_scale"]) == (32, 32, 1.0)
    assert info["infotexts"][0].endswith("Seed: 5, Size: 32x32, Model: pixels, RNG: CPU")


@pytest.mark.parametrize("texts", [{}, {"prompt": ""}, {"prompt": None}])
def test_the_images_api_draws_without_a_prompt(pixels: Server, texts: dict[str, Any]) -> None:
    body = {**texts, "num_inference_steps": STEPS, "seed": 7, "scheduler": "dpmpp-2m", "size": "40x32"}
    (drawn,) = pixels.post(DRAW, body)["data"]
    (expected,) = pixels.alone(steps=STEPS, seed=7, solver="dpmpp-2m", width=40, height=32)
    np.testing.assert_array_equal(decoded(drawn["b64_json"]), np.asarray(expected))


def test_previews_are_the_predicted_pixels(pixels: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler, hand_over = pixels.scheduler, pixels.scheduler.hand_over

    def heard(slot: Slot, preview: Any = None) -> None:
        """Go on once the client has heard of a preview: one that it has not would make way for the next."""
        before = slot.handle.shown
        hand_over(slot, preview)
        if preview is not None:
            eventually(lambda: slot.handle.shown is not before and not slot.handle._events)

    monkeypatch.setattr(scheduler, "hand_over", heard)
    body = {"num_inference_steps": 6, "seed": 3, "stream": True, "partial_images": 2}
    text = pixels.ask("POST", DRAW, json=body).text
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    *previews, last = map(json.loads, lines)
    assert [event["partial_image_index"] for event in previews] == [0, 1]
    expected: list[NDArray[np.float32]] = []
    (job,) = pixels.alone.requests([None], {"steps": 6, "seed": 3})
    job.wants_preview = True
    pixels.alone.run([job], lambda job: expected.append(job.preview))
    for event, latents in zip(previews, (expected[1], expected[3]), strict=True):
        np.testing.assert_array_equal(decoded(event["b64_json"]), np.asarray(pixels.alone.decode(latents)))
    np.testing.assert_array_equal(decoded(last["b64_json"]), np.asarray(pixels.alone.picture(job)))


@pytest.mark.parametrize(
    ("path", "asked", "words"),
    [
        (DRAW, {"prompt": "a cat"}, "reads no prompt"),
        (SD, {"prompt": "a cat"}, "reads no prompt"),
        (SD, {"negative_prompt": "blurry"}, "reads no negative_prompt"),
        (DRAW, {"class_label": 1}, "reads no class_label"),
        (DRAW, {"guidance_scale": 3}, "guidance is 3, and .* reads no prompt"),
        (DRAW, {"size": "36x32"}, "multiples of 8 from 8 to"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_it_does_not_read_is_refused(
    pixels: Server, path: str, asked: dict[str, Any], words: str, stream: bool
) -> None:
    error = pixels.refusal(path, {**asked, **({"stream": True} if stream and path == DRAW else {})})
    assert re.search(words, error["message"])


def test_classes_are_asked_for_by_number(classes: Server) -> None:
    (drawn,) = classes.post(DRAW, {"class_label": 2, "num_inference_steps": STEPS, "seed": 1})["data"]
    (file,) = classes.post(SD, {"class_label": 2, "steps": STEPS, "seed": 1})["images"]
    (expected,) = classes.alone(class_label=2, steps=STEPS, seed=1)
    np.testing.assert_array_equal([decoded(drawn["b64_json"]), decoded(file)], [np.asarray(expected)] * 2)
    assert json.loads(Image.open(BytesIO(base64.b64decode(file))).info["latentrt"])["class_label"] == 2
    for path in (DRAW, SD):
        missing, large = classes.refusal(path, {}), classes.refusal(path, {"class_label": 5})
        assert missing["param"] == large["param"] == "class_label"
        assert missing["message"].startswith("class_label is missing. Needed: a class from 0 to 4")
        assert large["message"].startswith("class_label is 5. Needed: at most 4")


def test_pictures_are_edited(pixels: Server) -> None:
    fields = {"strength": "0.5", "num_inference_steps": "6", "seed": "2"}
    answer = pixels.ask("POST", EDIT, data=fields, files={"image": ("a.png", png(32, 32, colour="red"), "image/png")})
    (expected,) = pixels.alone(image=Image.new("RGB", (32, 32), "red"), strength=0.5, steps=6, seed=2)
    np.testing.assert_array_equal(decoded(answer.json()["data"][0]["b64_json"]), np.asarray(expected))


def test_grey_models_take_the_pictures_that_wait_in_the_queue() -> None:
    latents = LatentSpec(1, 1, 1.0, 0.0, 16, 16)
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))
    file = BytesIO()
    given.save(file, "PNG")
    fitted = decode({"image": File("image", lambda: BytesIO(file.getvalue()))}, (16, 16), latents, 24 * 24)["image"]
    assert fitted.shape == (16, 16, 3)
    np.testing.assert_array_equal(prepared(fitted, None, 16, 16, latents)[0], prepared(given, None, 16, 16, latents)[0])


def test_what_may_be_offered(pixels: Server, classes: Server) -> None:
    known = pixels.ask("GET", "/latentrt/model").json()
    assert known["defaults"] == {"steps": 1000, "guidance": 1.0, "image_guidance": None, "scheduler": None}
    assert (known["limits"]["max_steps"], known["size"], known["step"]) == (1000, "32x32", 8)
    names = ("prompted", "class_labels", "classes", "edits")
    assert [known[name] for name in names] == [False, False, None, True]
    known = classes.ask("GET", "/latentrt/model").json()
    assert [known[name] for name in names] == [False, True, 5, True]


def test_defaults_that_cannot_be_are_known_at_the_start(pixels: Server) -> None:
    with pytest.raises(RequestError, match="guidance is 5"):
        catalog_of(pixels.alone.model, guidance=5)
    with pytest.raises(RequestError, match="1000 steps where no number is given"):
        catalog_of(pixels.alone.model, max_steps=50)
    assert catalog_of(pixels.alone.model, max_steps=50, steps=30).defaults.steps == 30


def test_one_thread_serves_a_device(exported: Exported) -> None:
    gpu = HostGpu()
    with Engine.load(exported("classes")[1], backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as engine:
        (job,) = engine.requests([None], {"steps": STEPS, "seed": 4, "class_label": 1})
        engine.run([job])
        expected = np.asarray(engine.picture(job))
        request = engine.model.filled(Request(steps=STEPS, seed=4, class_label=1))
        with Service(engine) as service:
            eventually(lambda: service.scheduler.ready)
            (drawn,) = wait(submit(service, Handle(request, (3, 16, 16), STEPS)).pictures())
    np.testing.assert_array_equal(np.asarray(drawn), expected)
    gpu.close()
