"""What does a server hold after minutes of everything at once? Memory, descriptors and threads, each second.

Clients draw, edit, stream, are refused and leave; the growth of each quantity is a line fitted to the means of half a
minute each, after the first fifth of the time.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from io import BytesIO
from statistics import fmean
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.serving import inside
from benchmarks.serving.clients import DRAW, EDIT, Client
from benchmarks.serving.process import Process, running
from benchmarks.serving.traffic import SOLVERS

CLIENTS = 12
WARM = 0.2  # the part of the time after which nothing should grow
BLOCK = 30.0  # seconds; nearer samples are not independent of each other, as an error needs
TITLES = {
    "memory": "resident memory, MiB",
    "allocated": "allocated, MiB",
    "blocks": "Python's blocks, thousands",
    "descriptors": "open files and sockets",
    "threads": "threads",
}
WHAT = ("draw", "draw", "edit", "stream", "wrong", "leave")
MORE: dict[str, dict[str, Any]] = {"stream": {"stream": True, "partial_images": 2}, "wrong": {"size": "1x1"}}
FORM = "multipart/form-data; boundary=x"


class Growth(NamedTuple):
    """Growth of a quantity a minute, and its standard error."""

    slope: float
    error: float

    @property
    def verdict(self) -> str:
        """The conclusion from it."""
        if abs(self.slope) <= 2 * self.error:
            return "no growth that can be told from none"
        return "grows" if self.slope > 0 else "shrinks"


def measure(minutes: float) -> dict[str, Any]:
    """Run a server of the embedded model under `CLIENTS` clients.

    Returns:
        {"minutes", "clients", "answers" by status, "samples": {"seconds" and all of `TITLES`}, "idle": the same
        quantities once all clients are gone}.
    """
    with running(command=inside.COMMAND) as one:
        answers, samples = asyncio.run(_soak(one, 60 * minutes))
        time.sleep(2)
        idle = _look(one)
    by_status = {str(status): count for status, count in sorted(answers.items())}
    return {"minutes": minutes, "clients": CLIENTS, "answers": by_status, "samples": samples, "idle": idle}


def growth(seconds: Sequence[float], values: Sequence[float]) -> Growth | None:
    """Return a minute's growth by least squares, over blocks after the warm part; None for fewer than three."""
    begin = WARM * max(seconds)
    blocks: dict[int, list[tuple[float, float]]] = {}
    for second, value in zip(seconds, values, strict=True):
        if second >= begin:
            blocks.setdefault(int((second - begin) / BLOCK), []).append((second / 60, value))
    points = [(fmean(x for x, _ in block), fmean(y for _, y in block)) for block in blocks.values()]
    return line(points) if len(points) > 2 else None


def line(points: Sequence[tuple[float, float]]) -> Growth:
    """Return slope and standard error of the straight line through three points or more."""
    middle, level = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - middle) ** 2 for x, _ in points)
    slope = sum((x - middle) * (y - level) for x, y in points) / spread
    rest = sum((y - level - slope * (x - middle)) ** 2 for x, y in points)
    return Growth(slope, (rest / (len(points) - 2) / spread) ** 0.5)


def growths(found: Mapping[str, Any]) -> dict[str, Growth | None]:
    """Return the growth of each quantity that was measured."""
    samples = found["samples"]
    return {name: growth(samples["seconds"], samples[name]) for name in TITLES}


# ---- Traffic and samples


async def _soak(one: Process, seconds: float) -> tuple[Counter[int], dict[str, list[float]]]:
    answers, numbers = Counter[int](), itertools.count()
    samples: dict[str, list[float]] = {name: [] for name in ("seconds", *TITLES)}
    start = time.monotonic()
    end = start + seconds

    async def client() -> None:
        while time.monotonic() < end:
            await _visit(one.url, next(numbers), answers)

    async def watch() -> None:
        for second in itertools.count(1):
            await asyncio.sleep(start + second - time.monotonic())
            if time.monotonic() > end:
                return
            for name, value in {"seconds": time.monotonic() - start, **_look(one)}.items():
                samples[name].append(value)
            if second % 30 == 0:
                print(f"{second} of {seconds:g} s: {_look(one)}, {dict(answers)}", flush=True)

    await asyncio.gather(watch(), *[client() for _ in range(CLIENTS)])
    return answers, samples


def _look(one: Process) -> dict[str, float]:
    told = next(line for line in reversed(one.log) if line["event"] == inside.EVENT)
    allocated = {name: float(told[name]) for name in ("allocated", "blocks")}
    return {"memory": one.memory, **allocated, "descriptors": one.descriptors, "threads": one.threads}


async def _visit(url: str, number: int, answers: Counter[int]) -> None:
    """Open a connection and send some requests on it."""
    dice, client = random.Random(number), await Client.connect(url)
    for _ in range(dice.randint(1, 4)):
        what, body = dice.choice(WHAT), _body(dice)
        if what == "leave":
            client.send(DRAW, {**body, "stream": dice.random() < 0.5, "num_inference_steps": 50})
            with suppress(TimeoutError):
                await asyncio.wait_for(client.reader.read(1), dice.uniform(0.0, 0.5))
            break
        if what == "edit":
            answer = await client.ask(EDIT, _form(body["prompt"]), FORM)
        else:
            answer = await client.ask(DRAW, {**body, **MORE.get(what, {})})
        answers[answer.status] += 1
    await client.leave()


def _body(dice: random.Random) -> dict[str, Any]:
    return {
        "prompt": f"an owl {dice.randrange(2**31)}",
        "seed": dice.randrange(2**31),
        "n": dice.randint(1, 3),
        "size": dice.choice(("64x64", "64x96", "128x128")),
        "num_inference_steps": dice.randint(2, 8),
        "scheduler": dice.choice(SOLVERS),
        "guidance_scale": dice.choice((1.0, 5.0)),
    }


def _form(prompt: str) -> bytes:
    """Return the body of an edit."""
    fields = {"prompt": prompt, "num_inference_steps": "4"}
    parts = [f'--x\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}'.encode() for k, v in fields.items()]
    head = b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\nContent-Type: image/png\r\n\r\n'
    return b"\r\n".join([head + _picture(), *parts, b"--x--\r\n"])


@cache
def _picture() -> bytes:
    buffer = BytesIO()
    Image.new("RGB", (96, 96), "teal").save(buffer, "PNG")
    return buffer.getvalue()
