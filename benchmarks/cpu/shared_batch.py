"""What is gained when jobs join and leave a shared batch at every step?

Measured: the same seeded traffic, in real time, served in four ways. Jobs differ in steps and solver, and some are
unguided. *By step*: a job joins the running batch as soon as it arrives, if there are lanes, and leaves when it is
done. *By request*: who waits when the last batch has ended and is of the oldest one's kind (steps, solver, guidance)
is made in one batch. *One at a time*: first come, first served. diffusers is served by request, the most it can do. A
job's latency runs from its arrival to its picture. The jobs arrive, on average, every 0.6 times what one 20-step
picture takes latentrt alone, so that a queue forms. In the end the latents of every job made in company are compared,
bit by bit, with those of the same job made alone.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.cases import PROMPTS, Config, Ours, Task, Theirs, psnr, task, together
from benchmarks.measures import OURS, THEIRS, Goal, Measure, Result, Spread
from benchmarks.timing import paired, timed
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes
from latentrt.run.job import Job

TITLE = "Jobs that join and leave a shared batch"
BY_STEP, BY_REQUEST, ALONE = f"{OURS}, by step", f"{OURS}, by request", f"{OURS}, one at a time"
THEIRS_BY_REQUEST = f"{THEIRS}, by request"
LOAD = 0.6
PICTURES = 8
STEPS, SOLVERS, GUIDANCES = (0.5, 1.0, 1.5), ("dpmpp-2m", "unipc", "euler"), (1.0, 3.0, 3.0)


class Arrival(NamedTuple):
    """A job of one picture that comes `at` seconds after the start."""

    number: int
    at: float
    task: Task


class Made(NamedTuple):
    """A picture, and the latents that it was decoded from where they are known."""

    picture: Any
    latents: Any = None


class Served(NamedTuple):
    """By arrival: seconds from arrival to picture, and the picture."""

    latencies: dict[int, float]
    made: dict[int, Made]


Draw = Callable[[Task], Sequence[Made]]


def measure(config: Config) -> Result:
    """Measure the time until all jobs are done, and their latencies, by every way to serve them."""
    ours, theirs = Ours(config, PICTURES), Theirs(config)
    ours.draw(task(config))
    alone = timed(ours.draw, task(config)).seconds
    traffic = arrivals(config, LOAD * alone)
    draws: dict[str, Draw] = {OURS: lambda t: _ours(ours, t), THEIRS: lambda t: [Made(p) for p in theirs.draw(t)]}
    runs = paired(
        {
            BY_STEP: lambda _: by_step(ours, traffic),
            BY_REQUEST: lambda _: by_request(draws[OURS], traffic, PICTURES),
            ALONE: lambda _: by_request(draws[OURS], traffic, 1),
            THEIRS_BY_REQUEST: lambda _: by_request(draws[THEIRS], traffic, PICTURES),
        },
        config.repeats,
        config.warmup,
    )
    served: dict[str, list[Served]] = {side: [sample.result for sample in runs[side]] for side in runs}
    facts = {"jobs": len(traffic), "mean_interval_s": LOAD * alone, **_compare({s: served[s][0] for s in served})}
    return Result(_measures(traffic, served), facts)


def goals(result: Result) -> list[Goal]:
    """Return the design's goal: a shared batch changes no latents."""
    same, jobs = result.facts["bitwise_as_alone"], result.facts["jobs"]
    return [
        Goal("latents in a shared batch are bitwise those made alone", f"{same} of {jobs} jobs", same == jobs),
        Goal("the same pictures (at least 40 dB)", f"{result.facts['psnr_db']:.1f} dB", result.facts["psnr_db"] >= 40),
    ]


def arrivals(config: Config, interval: float) -> list[Arrival]:
    """Return seeded traffic with exponential gaps of that mean, in seconds, and steps around the config's."""
    dice, at, traffic = random.Random(config.seed), 0.0, []
    for number in range(config.arrivals):
        steps = max(1, round(dice.choice(STEPS) * config.steps))
        prompt, seed = PROMPTS[number % len(PROMPTS)], config.seed + number
        one = Task((prompt,), (seed,), steps, dice.choice(SOLVERS), dice.choice(GUIDANCES))
        traffic.append(Arrival(number, at, one))
        at += dice.expovariate(1 / interval)
    return traffic


def by_step(ours: Ours, traffic: Sequence[Arrival]) -> Served:
    """Serve with jobs that join and leave between any two network calls."""
    denoiser = Denoiser(HostLanes(ours.engine.model.predictor, 2 * PICTURES))
    waiting, served = list(traffic), Served({}, {})
    owner: dict[Job, Arrival] = {}
    start = time.perf_counter()
    while waiting or denoiser.jobs:
        if not denoiser.jobs:
            _sleep_until(start + waiting[0].at)
        while waiting and waiting[0].at <= time.perf_counter() - start and denoiser.free >= 2:
            arrival = waiting.pop(0)
            (job,) = ours.jobs(arrival.task)
            denoiser.admit(job)
            owner[job] = arrival
        for job in denoiser.tick():
            if job.done:
                made = Made(ours.engine.picture(job), job.latents)
                _serve(served, [owner[job]], [made], time.perf_counter() - start)
    return served


def by_request(draw: Draw, traffic: Sequence[Arrival], most: int) -> Served:
    """Serve in batches that are closed when they start; at most `most` pictures each."""
    waiting, served = list(traffic), Served({}, {})
    start = time.perf_counter()
    while waiting:
        _sleep_until(start + waiting[0].at)
        now = time.perf_counter() - start
        alike = [a for a in waiting if a.at <= now and a.task.kind == waiting[0].task.kind]
        batch = alike[:most]
        made = draw(together([arrival.task for arrival in batch]))
        _serve(served, batch, made, time.perf_counter() - start)
        waiting = [arrival for arrival in waiting if arrival not in batch]
    return served


def _serve(served: Served, batch: Sequence[Arrival], made: Sequence[Made], now: float) -> None:
    for arrival, one in zip(batch, made, strict=True):
        served.latencies[arrival.number] = now - arrival.at
        served.made[arrival.number] = one


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.perf_counter()))


def _ours(ours: Ours, task: Task) -> list[Made]:
    jobs = ours.jobs(task)
    ours.engine.run(jobs)
    return [Made(ours.engine.picture(job), job.latents) for job in jobs]


def _measures(traffic: Sequence[Arrival], served: Mapping[str, Sequence[Served]]) -> list[Measure]:
    def all_done(one: Served) -> float:
        return max(arrival.at + one.latencies[arrival.number] for arrival in traffic)

    quantities: dict[str, Callable[[Served], float]] = {
        "until all are done": all_done,
        "median latency": lambda one: Spread.of(list(one.latencies.values())).median,
        "worst latency": lambda one: max(one.latencies.values()),
    }
    return [
        Measure(name, "s", {side: [quantity(one) for one in served[side]] for side in served})
        for name, quantity in quantities.items()
    ]


def _compare(first: Mapping[str, Served]) -> dict[str, Any]:
    """Count the jobs whose latents by step and by request are those alone; compare all pictures with diffusers'."""
    alone, numbers = first[ALONE].made, sorted(first[ALONE].made)
    same = [
        all(np.array_equal(first[side].made[n].latents, alone[n].latents) for side in (BY_STEP, BY_REQUEST))
        for n in numbers
    ]
    theirs = first[THEIRS_BY_REQUEST].made
    agreement = psnr([alone[n].picture for n in numbers], [theirs[n].picture for n in numbers])
    return {"bitwise_as_alone": sum(same), "psnr_db": agreement}
