"""Crowds: a real server process over fake networks of 10 ms a call, and clients that are not its own.

What clients saw, what the log says and what the metrics count must be one story.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack, suppress

import numpy as np
import pytest

from benchmarks.serving.clients import DRAW, Answer, Client, ask, metrics
from benchmarks.serving.process import Process, running
from tests.support.serve.fake_engine import PATIENCE, Fakes, fake_engine
from tests.support.serve.fake_server import fake
from tests.support.serve.traffic import Body, counted, drawn, until_idle, wanted, within

LANES = ("--lanes", "16", "--queue", "128")
full = pytest.mark.slow


async def crowd(url: str, bodies: Iterable[Body], clients: int) -> list[tuple[Body, Answer]]:
    """All answers, where so many clients take the next request as soon as they have an answer."""
    queue, answers = iter(bodies), []

    async def work() -> None:
        async with await Client.connect(url) as client:
            for body in queue:
                answers.append((body, await client.ask(DRAW, body)))

    await asyncio.gather(*[work() for _ in range(clients)])
    return answers


def one_story(one: Process, found: dict[str, float], outcomes: dict[str, int], done: int) -> None:
    """The log and the metrics count these requests by outcome, and so many finished pictures."""
    told = Counter(line["outcome"] for line in one.requests() if line["route"] == DRAW)
    for line in (line for line in one.log if line["event"] == "refusals"):
        told[line["outcome"]] += line["count"]
    assert told == outcomes
    assert counted(found, "requests", "outcome") == outcomes
    assert counted(found, "images", "outcome").get("done", 0) == done


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
            while not (await metrics(url))["latentrt_num_images_running"]:
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
    lines = one.requests()[:-1]  # without the one that came after all; where no body came there is no "n"
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
