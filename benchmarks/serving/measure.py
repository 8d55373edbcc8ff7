"""Take the samples: capacity first, then every policy at every load, then HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter
from typing import Any

from benchmarks.serving.clients import DRAW, Client, metrics, quantile
from benchmarks.serving.policies import (
    ALONE,
    BY_REQUEST,
    BY_STEP,
    HTTP,
    QUEUE,
    InBatches,
    OverHttp,
    Serve,
    replay,
    submitted,
)
from benchmarks.serving.process import running
from benchmarks.serving.traffic import Arrival, Outcome, arrivals
from engine import Engine
from engine.bench import measure as measure_engine
from engine.serve import curve
from engine.serve.service import Service

PLACES = 64  # of the queue that a burst meets


@dataclass(frozen=True, slots=True)
class Config:
    """How much is measured. Loads are offered pictures over what the engine can draw, both a second."""

    loads: tuple[float, ...] = (0.4, 0.7, 0.9, 1.2)
    http_load: float = 0.7
    seconds: float = 20.0
    pictures: int = 8  # that fit into a batch
    at_once: int = QUEUE  # pictures that capacity is measured with
    batches: tuple[int, ...] = (1, 2, 4, 8)
    refused: int = 436  # of a burst of 500
    singles: int = 30
    seed: int = 7


QUICK = Config(loads=(0.5,), http_load=0.5, seconds=2.0, at_once=4, batches=(1, 2), refused=20, singles=2)


def measure(config: Config) -> dict[str, Any]:
    """Everything, as JSON takes it."""
    with Engine.load(lanes=2 * config.pictures) as engine:
        measured = curve.of_bench(engine, measure_engine(engine, config.batches, steps=10, repeats=2))
        cap = measured.cap(next(iter(measured.ticks)), engine.denoiser.lanes)
        with Service(engine, queue=QUEUE, curve=measured) as service:
            service.self_check()
            capacity, outcomes, inside = asyncio.run(_in_process(service, cap // 2, config))
    with running("--lanes", str(2 * config.pictures), "--queue", str(QUEUE)) as one:
        outcome, outside = asyncio.run(_over_http(one.url, capacity, config))
    return {
        "config": asdict(config),
        "capacity": capacity,
        "batch_cap_lanes": cap,
        "outcomes": [one.to_dict() for one in (*outcomes, outcome)],
        "singles": {BY_STEP: inside, HTTP: outside},
        "refusals": [_refusals(config.refused, clients) for clients in (config.refused, 32)],
    }


async def _in_process(service: Service, batch: int, config: Config) -> tuple[float, list[Outcome], list[float]]:
    policies: dict[str, Serve] = {
        BY_STEP: lambda arrival: submitted(service, arrival),
        BY_REQUEST: InBatches(service, batch),
        ALONE: InBatches(service, 1),
    }
    at_once = [one._replace(at=0.0) for one in _some(config.at_once)]
    warm, timed = [await replay(BY_STEP, 0.0, at_once, policies[BY_STEP]) for _ in range(2)]
    del warm
    outcomes = []
    for load in config.loads:
        traffic = arrivals(load * timed.rate, config.seconds, config.seed)
        for policy, serve in policies.items():
            outcomes.append(await replay(policy, load, traffic, serve))
            _say(outcomes[-1])
    return timed.rate, outcomes, await _one_by_one(policies[BY_STEP], config)


async def _over_http(url: str, capacity: float, config: Config) -> tuple[Outcome, list[float]]:
    serve = OverHttp(url)
    await replay(HTTP, 0.0, [one._replace(at=0.0) for one in _some(config.at_once)], serve)  # warms up
    traffic = arrivals(config.http_load * capacity, config.seconds, config.seed)
    outcome = await replay(HTTP, config.http_load, traffic, serve)
    _say(outcome)
    singles = await _one_by_one(serve, config)
    await serve.close()
    return outcome, singles


async def _one_by_one(serve: Serve, config: Config) -> list[float]:
    """Seconds of pictures of ten guided steps, nothing else going on."""
    found = []
    for one in _some(config.singles):
        start = perf_counter()
        await serve(one._replace(steps=10, guidance=3.0))
        found.append(perf_counter() - start)
    return found


def _some(count: int) -> list[Arrival]:
    return arrivals(100.0, 100.0, 1)[:count]


def _say(outcome: Outcome) -> None:
    p50, p95, p99 = outcome.quantiles
    print(
        f"  load {outcome.load:g}, {outcome.policy}: {outcome.rate:.2f} pictures/s, p50 {p50:.2f} p95 {p95:.2f} "
        f"p99 {p99:.2f} s, {outcome.refused} of {outcome.arrived} refused",
        flush=True,
    )


# ---- Refusals


def _refusals(requests: int, clients: int) -> dict[str, Any]:
    """So many clients ask a server whose lanes and queue are full: how soon they know."""
    flags = ("--lanes", "2", "--queue", str(PLACES), "--max-steps", "999", "--run-timeout", "900")
    with running(*flags) as one:
        seen = asyncio.run(_refused(one.url, requests, clients))
        one.stop()
        own = [float(line["seconds"]) for line in one.requests() if line["status"] == 429]
    return {"clients": clients, "requests": requests, "client_seconds": seen, "server_seconds": own}


async def _refused(url: str, requests: int, clients: int) -> list[float]:
    """Seconds of each refusal, from the first byte that was sent to the last one that came."""
    long = await _sent(url, 999, "512x512")
    while not (await metrics(url))["latentrt:num_images_running"]:
        await asyncio.sleep(0.01)
    waiting = [await _sent(url, 1) for _ in range(PLACES)]
    while (await metrics(url))["latentrt:num_images_waiting"] < PLACES:
        await asyncio.sleep(0.01)
    crowd, left = [await Client.connect(url) for _ in range(clients)], iter(range(requests))

    async def ask(client: Client) -> list[float]:
        answers = [await client.ask(DRAW, {"prompt": "an owl"}) for _ in left]
        if any(answer.status != 429 for answer in answers):
            raise RuntimeError("the queue was not full")
        return [answer.seconds for answer in answers]

    found = await asyncio.gather(*[ask(client) for client in crowd])
    for client in (long, *waiting, *crowd):
        await client.leave()
    return [seconds for some in found for seconds in some]


async def _sent(url: str, steps: int, size: str = "64x64") -> Client:
    """A client that waits for a picture."""
    client = await Client.connect(url)
    client.send(DRAW, {"prompt": "an owl", "num_inference_steps": steps, "size": size})
    return client


# ---- What they say


def summary(refusal: dict[str, Any]) -> list[float]:
    """p50 and p99 of refusals in milliseconds: within the server, and as its clients see them."""
    sides: Sequence[list[float]] = (refusal["server_seconds"], refusal["client_seconds"])
    return [1000 * quantile(side, part) for side in sides for part in (0.5, 0.99)]


def overhead(found: dict[str, Any]) -> float:
    """Milliseconds that HTTP, base64 and PNG add to a picture that is drawn alone."""
    return 1000 * (median(found["singles"][HTTP]) - median(found["singles"][BY_STEP]))
