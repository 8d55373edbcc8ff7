"""What clients of a whole server ask for, what must be right afterwards, and what the metrics say."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.serving.clients import DRAW, Answer, ask, metrics
from benchmarks.serving.process import Process
from latentrt import Engine
from tests.support.serve.fake_engine import PATIENCE, Fakes, fake_engine

FORM = "multipart/form-data; boundary=x"
Body = dict[str, Any]
SIZES = ("64x64", "64x96", "128x128")
SOLVERS = ("ddim", "euler", "euler-ancestral", "dpmpp-2m", "unipc", "heun")
GAUGES = ("num_requests_running", "num_requests_waiting", "num_images_running", "num_images_waiting")


def wanted(number: int, most: int = 3) -> Body:
    """The request of that number: mixed in everything that may differ within a batch."""
    dice = random.Random(number)
    return {
        "prompt": dice.choice(("an owl", "a red apple", "a blue car on a road")),
        "seed": number,
        "n": dice.randint(1, most),
        "size": dice.choice(SIZES),
        "num_inference_steps": dice.randint(2, 8),
        "scheduler": dice.choice(SOLVERS),
        "guidance_scale": dice.choice((1.0, 5.0)),
    }


def drawn(engine: Engine, body: Body) -> list[Any]:
    """What the engine draws alone."""
    width, height = map(int, body["size"].split("x"))
    return engine(
        body["prompt"],
        seed=body["seed"],
        count=body["n"],
        steps=body["num_inference_steps"],
        solver=body["scheduler"],
        guidance=body["guidance_scale"],
        width=width,
        height=height,
    )


async def until_idle(url: str) -> dict[str, float]:
    """The metrics, as soon as every gauge is at zero."""
    while True:
        now = await metrics(url)
        if not any(now[f"latentrt_{gauge}"] for gauge in GAUGES):
            return now
        await asyncio.sleep(0.02)


def counted(found: dict[str, float], name: str, label: str) -> dict[str, int]:
    """A counter's values that are not zero, by a label."""
    return {
        key.partition(f'{label}="')[2].partition('"')[0]: int(value)
        for key, value in found.items()
        if key.startswith(f"latentrt_{name}_total{{") and value and ("route" not in key or DRAW in key)
    }


def within(seconds: float, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run it; what takes longer has failed."""

    async def bounded() -> Any:
        async with asyncio.timeout(seconds):
            return await work()

    return asyncio.run(bounded())


def form(*files: bytes, prompt: str = "an owl", names: tuple[str, ...] = ("image", "mask"), **fields: object) -> bytes:
    """The body of an edit."""
    parts = []
    for name, file in zip(names, files, strict=False):
        head = f'--x\r\nContent-Disposition: form-data; name="{name}"; filename="a.png"\r\n'
        parts.append(head.encode() + b"Content-Type: image/png\r\n\r\n" + file)
    for name, value in {"prompt": prompt, "num_inference_steps": 2, **fields}.items():
        parts.append(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}'.encode())
    return b"\r\n".join([*parts, b"--x--\r\n"])


def rough(side: int) -> bytes:
    """A PNG that does not shrink."""
    file = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def together(one: Process, *bodies: Body) -> list[Answer]:
    async def go() -> list[Answer]:
        return list(await asyncio.gather(*[ask(one.url, DRAW, body) for body in bodies]))

    answers: list[Answer] = within(PATIENCE, go)
    return answers


def are_right(bodies: list[Body], answers: list[Answer]) -> None:
    """Every picture is the one that its seed makes."""
    with fake_engine(Fakes(), lanes=16) as engine:
        for body, answer in zip(bodies, answers, strict=True):
            assert answer.status == 200, answer.body
            for got, expected in zip(answer.pictures(), drawn(engine, body), strict=True):
                np.testing.assert_array_equal(got, np.asarray(expected))
