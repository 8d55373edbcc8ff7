"""A modest client draws one small picture after the other: alone, and beside others, in turn, at a server of its own.

Each client has an address of its own (127.0.0.1, 127.0.0.2, ...: Linux), and so a share of its own.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from benchmarks.cases import PROMPTS
from benchmarks.serving.clients import DRAW, Client, metrics
from benchmarks.serving.process import running

STEPS = 20  # of the modest client's pictures
FLAGS = ("--threads", "1", "--max-n", "10")  # one core for calls, one for what is beside them
ROWS = "latentrt_step_seconds_count"
RUNNING = 8  # pictures of the others, as many as the lanes allow
Body = Mapping[str, Any]


class Company(NamedTuple):
    """Who draws beside the modest client: for each client the requests that it always has in progress."""

    words: str
    clients: Sequence[Sequence[Body]]
    flags: tuple[str, ...] = ()
    rows: int = 0  # that run before the modest client comes


SIXTY = [{"n": 10, "num_inference_steps": 25}] * 6
LARGE = {"n": 1, "num_inference_steps": 2, "size": "1536x1024"}
COMPANIES = {
    "greedy": Company("three clients with sixty pictures each", [SIXTY] * 3, ("--queue", "200")),
    "large": Company(
        "a picture of 1536x1024, while it is decoded in tiles of 512", [[LARGE]], ("--tile", "512"), rows=2
    ),
}


@dataclass(frozen=True)
class Config:
    """How much is measured: rounds, and pictures of each round alone and as many beside the others."""

    rounds: int = 5
    pictures: int = 20


PART = "beside"  # its name in the samples
QUICK = Config(rounds=1, pictures=2)


def measure(config: Config, names: Sequence[str] = tuple(COMPANIES)) -> dict[str, Any]:
    """Return for each company {"date", "load", "alone", "beside"}: a load average, and each round's seconds."""
    return {name: asyncio.run(_measured(COMPANIES[name], config)) for name in names}


async def _measured(company: Company, config: Config) -> dict[str, Any]:
    load, date = round(os.getloadavg()[0], 2), f"{datetime.now(UTC):%Y-%m-%d}"
    found: dict[str, Any] = {"date": date, "load": load, "alone": [], "beside": []}
    with running(*FLAGS, *company.flags) as server:
        async with await Client.connect(server.url) as modest:
            await _draws(modest, 3)  # warms up
            for number in range(config.rounds):
                found["alone"].append(await _draws(modest, config.pictures))
                async with _with(company, server.url):
                    found["beside"].append(await _draws(modest, config.pictures))
                alone, beside = (sorted(found[side][-1])[config.pictures // 2] for side in ("alone", "beside"))
                print(f"round {number + 1}: median {alone:.2f} s alone, {beside:.2f} s beside", flush=True)
    return found


async def _draws(client: Client, count: int) -> list[float]:
    """Return the seconds of pictures, one after the other."""
    seconds = []
    for number in range(count):
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, "num_inference_steps": STEPS}
        answer = await client.ask(DRAW, body)
        if answer.status != 200:
            raise RuntimeError(f"the modest client was refused: {answer.body!r}")
        seconds.append(answer.seconds)
    return seconds


@asynccontextmanager
async def _with(company: Company, url: str) -> AsyncIterator[None]:
    """Have the others draw meanwhile, again and again; they leave at the end."""
    asked = [(f"127.0.0.{at + 2}", body) for at, bodies in enumerate(company.clients) for body in bodies]
    ran = (await metrics(url)).get(ROWS, 0.0)
    tasks = [asyncio.create_task(_keeps_asking(url, address, body)) for address, body in asked]
    while (await _count(url, "running")) < min(RUNNING, sum(body["n"] for _, body in asked)):
        await asyncio.sleep(0.01)
    while (await metrics(url)).get(ROWS, 0.0) < ran + company.rows:
        await asyncio.sleep(0.1)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        while await _count(url, "running", "waiting"):
            await asyncio.sleep(0.05)


async def _keeps_asking(url: str, address: str, body: Body) -> None:
    async with await Client.connect(url, local_addr=(address, 0)) as client:
        while (answer := await client.ask(DRAW, {"prompt": PROMPTS[0], **body})).status in (200, 429):
            if answer.status == 429:
                await asyncio.sleep(0.1)
        raise RuntimeError(f"a client of the company was refused: {answer.body!r}")


async def _count(url: str, *states: str) -> float:
    now = await metrics(url)
    return sum(now[f"latentrt_num_images_{state}"] for state in states)
