"""The process: it starts, draws with the embedded model, drains, and ends as it should."""

from __future__ import annotations

import base64
import json
import signal
import socket
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from safetensors.numpy import save_file

from benchmarks.serving.process import Process, running
from latentrt import Engine
from latentrt.bundle.bundle import Bundle
from latentrt.errors import BackendError, PlanError
from latentrt.request import Request
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.serve import server
from latentrt.serve.process.config import Settings, load_settings
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fakes import get, post


def test_it_draws_what_the_engine_draws_and_drains() -> None:
    with running() as one:
        with openai.OpenAI(base_url=f"{one.url}/v1", api_key="any", max_retries=0) as client:
            body = {"seed": 7, "num_inference_steps": 4}
            answer = client.images.generate(prompt="a red apple", n=2, extra_body=body)
            given = np.zeros((128, 128, 3), np.uint8)
            given[:, :, 0] = 255
            area = Image.fromarray(np.uint8(np.arange(128)[None, :].repeat(128, 0) < 64) * np.uint8(255))
            mask = Image.merge("RGBA", [area, area, area, Image.eval(area, lambda level: 255 - level)])
            edited = client.images.edit(
                prompt="a red apple",
                image=png_of(Image.fromarray(given)),
                mask=png_of(mask),
                extra_body={**body, "strength": 0.5},
            )
            events = list(client.images.generate(prompt="a red apple", stream=True, partial_images=1, extra_body=body))
        drawing = threading.Thread(target=draw, args=(one, {"prompt": "a", "num_inference_steps": 60}, codes := []))
        drawing.start()
        while 'latentrt_num_requests_running{model_name="emoji"} 1.0' not in get(f"{one.url}/metrics").text:
            time.sleep(0.005)
        one.process.send_signal(signal.SIGTERM)
        while one.answers("/health/ready"):
            time.sleep(0.005)
        late = post(f"{one.url}/v1/images/generations", json={"prompt": "b"})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "draining")
        assert one.answers("/health/live")
        drawing.join()
        assert one.end() == 0
    assert codes == [200]
    with Engine.load(threads=1) as sd:
        expected = [*sd("a red apple", seed=7, steps=4, count=2)]
        expected += [expected[0], *sd("a red apple", seed=7, steps=4, image=given, mask=area, strength=0.5)]
    for image, pixels in zip([*answer.data, events[-1], *edited.data], expected, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(base64.b64decode(image.b64_json)))), pixels)
    lines = [line for line in one.log if line["event"] == "request"]
    assert [line["status"] for line in lines if line.get("n")] == [200, 200, 200, 503, 200]
    assert "apple" not in json.dumps(one.log)


def test_a_hangup_reads_the_keys_again_and_ends_nothing(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("old\n")
    with running("--keys-file", str(file)) as one:

        def statuses() -> list[int]:
            keys = ("old", "new")
            return [get(f"{one.url}/v1/models", headers={"authorization": f"Bearer {key}"}).status_code for key in keys]

        assert statuses() == [200, 401]
        file.write_text("new\n")
        one.process.send_signal(signal.SIGHUP)
        while statuses() != [401, 200]:
            time.sleep(0.005)
        one.process.send_signal(signal.SIGTERM)
        assert one.end() == 0


def png_of(image: Image.Image) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def draw(one: Process, body: dict[str, Any], codes: list[int]) -> None:
    codes.append(httpx.post(f"{one.url}/v1/images/generations", json=body, timeout=PATIENCE).status_code)


def test_a_second_signal_ends_it_at_once() -> None:
    with running("--max-steps", "999", "--run-timeout", "900") as one:
        drawing = threading.Thread(target=leave_hanging, args=(one,))
        drawing.start()
        while not httpx.get(f"{one.url}/latentrt/queue", timeout=PATIENCE).json()["jobs"]:
            time.sleep(0.005)
        one.process.send_signal(signal.SIGTERM)
        while one.answers("/health/ready"):
            time.sleep(0.005)
        one.process.send_signal(signal.SIGTERM)
        assert one.end() == 128 + signal.SIGTERM
        drawing.join()


def leave_hanging(one: Process) -> None:
    body = {"prompt": "a", "num_inference_steps": 999, "size": "512x512"}
    with pytest.raises(httpx.TransportError):
        httpx.post(f"{one.url}/v1/images/generations", json=body, timeout=PATIENCE)


def test_what_is_not_finished_in_time_is_said() -> None:
    with running("--max-steps", "999", "--drain-timeout", "0.1") as one:
        body = {"prompt": "a", "num_inference_steps": 999, "size": "512x512"}
        codes: list[int] = []
        drawing = threading.Thread(
            target=lambda: codes.append(
                httpx.post(f"{one.url}/v1/images/generations", json=body, timeout=PATIENCE).status_code
            )
        )
        drawing.start()
        while not httpx.get(f"{one.url}/latentrt/queue", timeout=PATIENCE).json()["jobs"]:
            time.sleep(0.005)
        one.process.send_signal(signal.SIGINT)
        drawing.join()
        assert one.end() == server.UNDRAINED
    assert codes == [503]
    assert "not everything was finished in time" in [line["event"] for line in one.log]


def test_a_port_that_is_taken_is_known_before_anything_is_loaded() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        with (
            pytest.raises(BackendError, match="cannot be listened on") as caught,
            server.listening(Settings(port=sock.getsockname()[1])),
        ):
            pass
    assert "--port" in caught.value.fix


def test_threads_do_not_spin_unless_the_settings_say_so() -> None:
    for settings, spins in ((Settings(threads=1), False), (Settings(threads=1, spin=True), True)):
        with server.loaded(settings) as engine:
            assert isinstance(engine.backend, OrtBackend)
            assert engine.backend.spin is spins


def test_loras_are_merged_for_all_pictures_and_the_model_keeps_its_name(tmp_path: Path) -> None:
    shapes = {"unet.conv_out.lora_A.weight": (1, 64, 3, 3), "unet.conv_out.lora_B.weight": (4, 1, 1, 1)}
    lora = tmp_path / "bright.safetensors"
    save_file({name: np.ones(shape, np.float32) for name, shape in shapes.items()}, lora)
    settings = load_settings({"lora": f"{lora}:0.5", "threads": 1, "edits": False})
    with server.assembled(settings) as app, server.loaded(settings) as engine:
        assert engine.lora == ("bright.safetensors:0.5",)
        assert app.state.models.entries[0].name == "emoji"


@pytest.mark.parametrize("edits", [True, False])
def test_whatever_will_be_used_is_loaded_at_the_start(edits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    load = OrtBackend.load

    def recording(backend: OrtBackend, bundle: Bundle, network: str) -> Any:
        opened.append(network)
        return load(backend, bundle, network)

    monkeypatch.setattr(OrtBackend, "load", recording)
    with server.loaded(Settings(threads=1, edits=edits)) as engine:
        always = ["text_encoder", "unet", "unet_text", "vae_decoder"]
        assert sorted(opened) == [*always, *(["vae_encoder"] if edits else [])]
        engine.model.given({"image": np.zeros((64, 64, 3), np.uint8)}, Request(prompt=""))
        assert opened.count("vae_encoder") == 1


def test_edits_without_a_plan_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    load = OrtBackend.load

    def missing(backend: OrtBackend, bundle: Bundle, network: str) -> Any:
        if network == "vae_encoder":
            raise PlanError("there is no plan", needed="one", fix="latentrt build BUNDLE")
        return load(backend, bundle, network)

    monkeypatch.setattr(OrtBackend, "load", missing)
    with pytest.raises(PlanError, match="--no-edits"), server.loaded(Settings(threads=1)):
        pass
