"""Take the samples. The ways to serve take turns over the same arrivals, so that the machine's load meets them all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from benchmarks.serving import refusals
from benchmarks.serving.fake import fake_engine
from benchmarks.serving.policies import (
    ALONE,
    BY_REQUEST,
    BY_STEP,
    HTTP,
    QUEUE,
    InBatches,
    OverHttp,
    Serve,
    Ticks,
    replay,
    submitted,
)
from benchmarks.serving.process import running
from benchmarks.serving.traffic import Outcome, arrivals, crowd
from latentrt import Engine
from latentrt.command.bench import measure as measure_engine
from latentrt.serve.core.measured import curve
from latentrt.serve.core.pipeline import GUIDED, Shape
from latentrt.serve.core.queue import Limits
from latentrt.serve.core.service import Service

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """One engine under traffic.

    Attributes:
        loads: offered pictures over what the engine can draw, both a second.
        http_load: where HTTP is tried too; None for nowhere.
        seconds: of arrivals, for each load, seed and way to serve.
        lanes: of a network call.
    """

    loads: tuple[float, ...]
    http_load: float | None
    seconds: float
    lanes: int

    def sides(self, load: float) -> list[str]:
        """Return the ways to serve that are tried at a load."""
        return [BY_STEP, BY_REQUEST, ALONE, *([HTTP] if load == self.http_load else [])]


@dataclass(frozen=True, slots=True)
class Config:
    """The settings of a measurement."""

    emoji: Part = field(default_factory=lambda: Part((0.4, 0.7, 0.9, 1.0, 1.2), 0.7, 4.0, 16))
    fake: Part = field(default_factory=lambda: Part((0.4, 0.7, 1.0), None, 1.5, 8))
    seeds: tuple[int, ...] = (7, 8, 9, 10, 11)
    crowd: int = QUEUE  # pictures at once, from which capacity is measured
    burst: int = 500  # requests
    crowds: tuple[int, ...] = (500, 32)  # clients that send them
    bursts: int = 5
    singles: int = 20


QUICK = Config(
    emoji=Part((0.5,), 0.5, 1.0, 16),
    fake=Part((0.5,), None, 0.5, 8),
    seeds=(7, 8),
    crowd=4,
    burst=80,
    crowds=(80,),
    bursts=1,
    singles=2,
)


def measure(config: Config) -> dict[str, Any]:
    """Measure everything; return it as JSON takes it."""
    say = _clock()
    with Engine.load(lanes=config.emoji.lanes) as engine:
        emoji = _part(engine, config.emoji, config, say)
    with fake_engine(config.fake.lanes) as engine:
        fake = _part(engine, config.fake, config, say)
    say("refusals")
    refused = refusals.measure(config.burst, config.crowds, config.bursts)
    return {"config": asdict(config), "emoji": emoji, "fake": fake, "refusals": refused}


def _clock() -> Say:
    start = time.monotonic()

    def say(words: str) -> None:
        minutes, seconds = divmod(round(time.monotonic() - start), 60)
        print(f"{minutes}:{seconds:02}  {words}", flush=True)

    return say


def _part(engine: Engine, part: Part, config: Config, say: Say) -> dict[str, Any]:
    """Measure one engine: its curve, its capacity, and the outcome of all traffic."""
    measured = _curve(engine, part.lanes)
    (shape,) = measured.ticks
    cap, ticks = measured.cap(shape, part.lanes), Ticks()
    with ExitStack() as stack:
        service = stack.enter_context(Service(engine, Limits(QUEUE), curve=measured, observer=ticks))
        while not service.scheduler.ready:
            time.sleep(0.01)
        url = None
        if part.http_load is not None:  # a server without a curve fills its lanes: it gets as many as the curve allows
            url = stack.enter_context(running("--lanes", str(cap), "--queue", str(QUEUE))).url
        found = asyncio.run(_served(service, shape, cap // GUIDED, ticks, part, config, say, url))
    return {"curve": measured.ticks[shape], "decode": measured.decode[shape], "cap": cap, **found}


def _curve(engine: Engine, lanes: int) -> curve.Curve:
    """Of the fastest runs: the curve says how many lanes pay, and whatever else a machine does only slows a run."""
    batches = [2**power for power in range((lanes // GUIDED).bit_length())]
    found = measure_engine(engine, batches, steps=10, repeats=5)
    fastest = [{**row, "step_ms": (row["step_ms"][0],) * 3} for row in found["batches"]]
    return curve.of_bench(engine, {**found, "batches": fastest})


async def _served(
    service: Service, shape: Shape, batch: int, ticks: Ticks, part: Part, config: Config, say: Say, url: str | None
) -> dict[str, Any]:
    def draw(arrival: Any) -> Any:
        return submitted(service.scheduler, shape, arrival)

    sides: dict[str, Serve] = {BY_STEP: draw, BY_REQUEST: InBatches(draw, batch), ALONE: InBatches(draw, 1)}
    if url is not None:
        sides[HTTP] = OverHttp(url)
        await replay(HTTP, 0.0, 0, crowd(config.crowd, 1), sides[HTTP])  # warms up
    capacity = await _capacity(draw, config.crowd)
    say(f"the engine draws {capacity:.1f} pictures/s; batches by request have {batch}")
    outcomes: list[Outcome] = []
    runs = _plan(part, config.seeds)
    for number, (load, seed, side) in enumerate(runs, 1):
        traffic = arrivals(load * capacity, part.seconds, seed)
        outcomes.append(await replay(side, load, seed, traffic, sides[side], None if side == HTTP else ticks))
        say(f"{number} of {len(runs)}: {_words(outcomes[-1])}")
    singles = await _one_by_one({side: sides[side] for side in (BY_STEP, HTTP) if side in sides}, config.singles)
    over_http = sides.get(HTTP)
    if isinstance(over_http, OverHttp):
        await over_http.close()
    return {"capacity": capacity, "outcomes": [one.to_dict() for one in outcomes], "singles": singles}


def _plan(part: Part, seeds: Sequence[int]) -> list[tuple[float, int, str]]:
    """Return load, seed and side of every run. Sides take turns within a seed, every other seed in reverse order."""
    return [
        (load, seed, side)
        for number, seed in enumerate(seeds)
        for load in part.loads
        for side in part.sides(load)[:: -1 if number % 2 else 1]
    ]


async def _capacity(draw: Serve, pictures: int) -> float:
    """Return pictures a second, batched by step, of the fastest of four crowds."""
    return max([(await replay(BY_STEP, 0.0, 0, crowd(pictures, 1), draw)).rate for _ in range(4)])


async def _one_by_one(sides: Mapping[str, Serve], count: int) -> dict[str, list[float]]:
    """Return seconds of pictures of ten guided steps, with no other load; the sides take turns."""
    found: dict[str, list[float]] = {side: [] for side in sides}
    for one in crowd(count, 1):
        for side, serve in sides.items():
            start = time.perf_counter()
            await serve(one._replace(steps=10, guidance=3.0))
            found[side].append(time.perf_counter() - start)
    return found


def _words(one: Outcome) -> str:
    times = ", ".join(f"{name} {one.latency(name):.2f} s" for name in ("p50", "p95"))
    others = "" if one.others is None else f"; others used {one.others:.2f} cores"
    return f"load {one.load:g}, seed {one.seed}, {one.policy}: {times}; {one.refused} of {one.arrived} refused{others}"
