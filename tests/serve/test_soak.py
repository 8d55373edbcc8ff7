"""Five minutes of everything at once: what a server holds in the end is what it held after the first minute."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import time
from collections import Counter
from contextlib import suppress

import pytest

from benchmarks.serving.clients import DRAW, EDIT, Client
from benchmarks.serving.process import Process, running
from tests.support.serve.fake_engine import PATIENCE
from tests.support.serve.fake_server import fake
from tests.support.serve.fakes import png
from tests.support.serve.traffic import FORM, form, until_idle, wanted, within

MINUTES = float(os.environ.get("SOAK_MINUTES", "5"))
WARM = 0.2  # the part of it after which nothing may grow any more
MORE_MIB, MORE_FILES = 24, 4


@pytest.mark.slow
def test_memory_and_descriptors_are_stable() -> None:
    with running("--lanes", "16", command=fake()) as one:
        seen, samples = within(60 * MINUTES + PATIENCE, lambda: _soak(one, 60 * MINUTES))
        within(PATIENCE, lambda: until_idle(one.url))
        after = (one.memory, one.descriptors)
        assert one.stop() == 0
    first, *_, last = samples
    print(f"\n{dict(seen)}; (MiB, files): warm {first}, last {last}, idle {after}")
    assert set(seen) <= {200, 400, 429}
    assert max(memory for memory, _ in samples) < first[0] + MORE_MIB
    assert after[1] <= first[1] + MORE_FILES


async def _soak(one: Process, seconds: float) -> tuple[Counter[int], list[tuple[float, int]]]:
    """Answers by status, and memory and descriptors since it is warm."""
    seen: Counter[int] = Counter()
    numbers, end = itertools.count(), time.monotonic() + seconds
    samples: list[tuple[float, int]] = []

    async def client() -> None:
        while time.monotonic() < end:
            await _visit(one.url, next(numbers), seen)

    async def watch() -> None:
        await asyncio.sleep(WARM * seconds)
        while time.monotonic() < end:
            samples.append((round(one.memory, 1), one.descriptors))
            await asyncio.sleep(seconds / 100)

    await asyncio.gather(watch(), *[client() for _ in range(12)])
    return seen, samples


async def _visit(url: str, number: int, seen: Counter[int]) -> None:
    """A connection with some requests on it: drawn, edited, streamed, refused, left."""
    dice = random.Random(number)
    async with await Client.connect(url) as client:
        for _ in range(dice.randint(1, 4)):
            body = {**wanted(dice.randrange(2**31)), "prompt": f"an owl {number}"}
            what = dice.choice(("draw", "draw", "edit", "stream", "wrong", "leave"))
            if what == "leave":
                client.send(DRAW, {**body, "stream": dice.random() < 0.5, "num_inference_steps": 50})
                with suppress(TimeoutError):
                    await asyncio.wait_for(client.reader.read(1), dice.uniform(0.0, 0.2))
                break
            if what == "edit":
                answer = await client.ask(EDIT, form(png(96, 96), prompt=f"a cat {number}"), FORM)
            else:
                more = {"stream": {"stream": True, "partial_images": 2}, "wrong": {"size": "1x1"}}.get(what, {})
                answer = await client.ask(DRAW, {**body, **more})
            seen[answer.status] += 1
