"""`latentrt serve NAME=BUNDLE ...` as a process, with the embedded models."""

from __future__ import annotations

import base64
import signal
import threading
import time
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.serving.process import Process, running
from latentrt import Engine
from tests.support.serve.fakes import get, post

ASKED: dict[str, Any] = {"num_inference_steps": 3, "seed": 7}
APPLE = {**ASKED, "model": "drawn", "prompt": "a red apple"}


def drawn(one: Process, body: dict[str, Any]) -> NDArray[np.uint8]:
    answer = post(f"{one.url}/v1/images/generations", json=body)
    assert answer.status_code == 200, answer.text
    return np.asarray(Image.open(BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"]))))


def test_two_models_draw_are_dropped_and_drain() -> None:
    with running("drawn=emoji", "small=pixels", "--threads", "1", "--idle-unload", "0.3") as one:
        found: dict[str, NDArray[np.uint8]] = {}

        def draw(name: str, body: dict[str, Any]) -> None:
            found[name] = drawn(one, body)

        bodies = {"drawn": APPLE, "small": {**ASKED, "model": "small"}}
        threads = [threading.Thread(target=draw, args=named) for named in bodies.items()]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        while get(f"{one.url}/health/ready").json()["models"] != dict.fromkeys(bodies, "unloaded"):
            time.sleep(0.05)
        while one.memory > one.peak - 30:  # MiB
            time.sleep(0.05)
        late = threading.Thread(target=draw, args=("again", APPLE))
        late.start()
        while late.is_alive() and not get(f"{one.url}/latentrt/queue").json()["waiting"]:
            time.sleep(0.005)
        one.process.send_signal(signal.SIGTERM)  # what waits for a load is finished
        late.join()
        assert one.end() == 0
    with Engine.load(threads=1) as sd:
        (apple,) = sd("a red apple", seed=7, steps=3)
    with Engine.load("pixels", threads=1) as sd:
        (small,) = sd(seed=7, steps=3)
    for name, expected in {"drawn": apple, "again": apple, "small": small}.items():
        np.testing.assert_array_equal(found[name], np.asarray(expected))
    events = [(line["event"], line["model"]) for line in one.log if line["event"] in ("loaded", "dropped")]
    assert [event for event in events if event[1] == "small"] == [("loaded", "small"), ("dropped", "small")]
