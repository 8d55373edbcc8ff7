"""Crowds: a real server process over fake networks of 10 ms a call, and clients that are not its own.

What clients saw, what the log says and what the metrics count must be one story.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack, suppress
from typing import Any

import numpy as np
import pytest

from benchmarks.serving.clients import DRAW, Answer, Client, ask, metrics
from benchmarks.serving.process import Process, running
from latentrt import Engine
from tests.support.serve.fake_engine import PATIENCE, Fakes, fake_engine
from tests.support.serve.fake_server import fake

Body = dict[str, Any]
SIZES = ("64x64", "64x96", "128x128")
SOLVERS = ("ddim", "euler", "euler-ancestral", "dpmpp-2m", "unipc", "heun")
GAUGES = ("num_requests_running", "num_requests_waiting", "num_images_running", "num_images_waiting")
LANES = ("--lanes", "16", "--queue", "128")
full = pytest.mark.slow


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


async def crowd(url: str, bodies: Iterable[Body], clients: int) -> list[tuple[Body, Answer]]:
    """All answers, where so many clients take the next request as soon as they have an answer."""
    queue, answers = iter(bodies), []

    async def work() -> None:
        async with await Client.connect(url) as client:
            for body in queue:
                answers.append((body, await client.ask(DRAW, body)))

    await asyncio.gather(*[work() for _ in range(clients)])
    return answers


async def until_idle(url: str) -> dict[str, float]:
    """The metrics, as soon as every gauge is at zero."""
    while True:
        now = await metrics(url)
        if not any(now[f"latentrt:{gauge}"] for gauge in GAUGES):
            return now
        await asyncio.sleep(0.02)


def counted(found: dict[str, float], name: str, label: str) -> dict[str, int]:
    """A counter's values that are not zero, by a label."""
    return {
        key.partition(f'{label}="')[2].partition('"')[0]: int(value)
        for key, value in found.items()
        if key.startswith(f"latentrt:{name}_total{{") and value and ("route" not in key or DRAW in key)
    }


def one_story(one: Process, found: dict[str, float], outcomes: dict[str, int], done: int) -> None:
    """The log and the metrics count these requests by outcome, and so many finished pictures."""
    lines = [line for line in one.requests() if line["route"] == DRAW]
    assert Counter(line["outcome"] for line in lines) == outcomes
    assert counted(found, "requests", "outcome") == outcomes
    assert counted(found, "images", "outcome").get("done", 0) == done


def within(seconds: float, work: Callable[[], Awaitable[Any]]) -> Any:
    """Run it; what takes longer has failed."""

    async def bounded() -> Any:
        async with asyncio.timeout(seconds):
            return await work()

    return asyncio.run(bounded())


@pytest.mark.parametrize("requests", [60, pytest.param(2000, marks=full)])
def test_every_picture_of_a_crowd_is_the_one_its_seed_makes(requests: int) -> None:
    with running(*LANES, command=fake()) as one:
        answers = within(PATIENCE, lambda: crowd(one.url, map(wanted, range(requests)), 32))
        found = within(PATIENCE, lambda: until_idle(one.url))
        assert one.stop() == 0
    assert Counter(answer.status for _, answer in answers) == {200: requests}
    with fake_engine(Fakes(), lanes=16) as engine:
        for body, answer in answers:
            for got, expected in zip(answer.pictures(), drawn(engine, body), strict=True):
                np.testing.assert_array_equal(got, np.asarray(expected))
    one_story(one, found, {"ok": requests}, sum(body["n"] for body, _ in answers))


@pytest.mark.parametrize("requests", [100, pytest.param(500, marks=full)])
def test_of_a_burst_exactly_the_excess_is_refused(requests: int) -> None:
    """One picture has all lanes meanwhile, so that nothing leaves the queue before the burst is over."""
    places = 64
    burst = [{**wanted(number, most=1), "num_inference_steps": 1, "size": "64x64"} for number in range(requests)]

    async def go(url: str) -> list[Answer]:
        async with AsyncExitStack() as stack, await Client.connect(url) as long:
            long.send(DRAW, {"prompt": "an owl", "num_inference_steps": 999, "size": "64x64"})
            while not (await metrics(url))["latentrt:num_images_running"]:
                await asyncio.sleep(0.01)
            clients = [await stack.enter_async_context(await Client.connect(url)) for _ in burst]
            asked = [asyncio.ensure_future(client.ask(DRAW, body)) for client, body in zip(clients, burst, strict=True)]
            while sum(task.done() for task in asked) < requests - places:
                await asyncio.sleep(0.01)
            await long.leave()
            return list(await asyncio.gather(*asked))

    with running("--lanes", "2", "--queue", str(places), "--max-steps", "999", command=fake()) as one:
        answers = within(PATIENCE, lambda: go(one.url))
        found = within(PATIENCE, lambda: until_idle(one.url))
        assert one.stop() == 0
    refused = [answer for answer in answers if answer.status != 200]
    assert Counter(answer.code for answer in refused) == {"queue_full": requests - places}
    assert all(answer.status == 429 and int(answer.headers["retry-after"]) >= 1 for answer in refused)
    one_story(one, found, {"ok": places, "queue_full": requests - places, "client_gone": 1}, places)
    assert counted(found, "request_rejected", "reason") == {"queue_full": requests - places}


@pytest.mark.parametrize("requests", [60, pytest.param(1000, marks=full)])
def test_clients_that_leave_early_cost_nobody_else_anything(requests: int) -> None:
    bodies = [wanted(number) for number in range(requests)]
    leavers = [{**body, "num_inference_steps": 90, "stream": body["seed"] % 8 == 0} for body in bodies[::4]]
    stayers = [body for body in bodies if body["seed"] % 4]

    async def go(url: str) -> list[tuple[Body, Answer]]:
        answers, _ = await asyncio.gather(crowd(url, stayers, 24), leave(url, iter(leavers), 8))
        return answers

    with running(*LANES, command=fake()) as one:
        answers = within(PATIENCE, lambda: go(one.url))
        found = within(PATIENCE, lambda: until_idle(one.url))
        with fake_engine(Fakes(), lanes=16) as engine:
            for body, answer in answers[::5]:
                for got, expected in zip(answer.pictures(), drawn(engine, body), strict=True):
                    np.testing.assert_array_equal(got, np.asarray(expected))
        assert within(PATIENCE, lambda: ask(one.url, DRAW, bodies[1])).status == 200
        assert one.stop() == 0
    assert Counter(answer.status for _, answer in answers) == {200: len(stayers)}
    lines = one.requests()[:-1]  # the last is the one that came after all; who left at the door has no "n"
    gone = [line for line in lines if line["outcome"] == "client_gone"]
    assert len(gone) == len(leavers)
    assert len(lines) == requests
    images = counted(found, "images", "outcome")
    assert set(images) == {"done", "cancelled"}
    assert sum(images.values()) == sum(line.get("n", 0) for line in lines)
    assert images["done"] >= sum(line.get("done", 0) for line in lines)  # more where one was done as its client left


async def leave(url: str, bodies: Iterable[Body], clients: int) -> None:
    """Clients that hang up while their pictures wait, or are drawn: these take longer than any of them stays."""
    queue = iter(bodies)

    async def work() -> None:
        for body in queue:
            async with await Client.connect(url) as client:
                client.send(DRAW, body)
                with suppress(TimeoutError):
                    async with asyncio.timeout(random.Random(body["seed"]).uniform(0.02, 0.3)):
                        await client.reader.read(-1)

    await asyncio.gather(*[work() for _ in range(clients)])
