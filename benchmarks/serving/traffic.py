"""Traffic and its outcome: seeded Poisson arrivals, the outcome of each, and the arithmetic over both."""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks.cases import PROMPTS

SOLVERS, GUIDANCES, STEPS = ("dpmpp-2m", "unipc", "euler", "ddim"), (1.0, 3.0, 3.0), (10, 30)
COUNTS = (1, 1, 1, 1, 2, 4)  # pictures of a request
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class Arrival(NamedTuple):
    """A request for so many pictures `at` seconds after the start."""

    at: float
    prompt: str
    seed: int
    pictures: int
    steps: int
    solver: str
    guidance: float

    @property
    def body(self) -> dict[str, Any]:
        """The request's body in HTTP."""
        settings = {"num_inference_steps": self.steps, "scheduler": self.solver, "guidance_scale": self.guidance}
        return {"prompt": self.prompt, "seed": self.seed, "n": self.pictures, **settings}


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Return requests with exponential gaps, the first at 0: a Poisson process with a given number of arrivals.

    Of all that might come in a few seconds only as many are taken as make that many pictures a second: left to chance,
    they would differ by a third from seed to seed, and so would the load. A seed's requests are the same at any rate.
    """
    dice, found, at, pictures = random.Random(seed), list[Arrival](), 0.0, 0
    while pictures < max(1, rate * seconds):
        prompt = f"{dice.choice(PROMPTS)} {len(found)}"
        kind = (dice.choice(COUNTS), dice.randint(*STEPS), dice.choice(SOLVERS), dice.choice(GUIDANCES))
        found.append(Arrival(at, prompt, seed + 10 * len(found), *kind))
        at += dice.expovariate(1.0)
        pictures += found[-1].pictures
    return [one._replace(at=one.at / at * pictures / rate) for one in found]


def crowd(pictures: int, seed: int) -> list[Arrival]:
    """Return so many requests of one picture each, all at once."""
    mixed = arrivals(rate=sum(COUNTS) * pictures, seconds=1.0, seed=seed)
    return [one._replace(at=0.0, pictures=1) for one in mixed[:pictures]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to serve one traffic: seconds from arrival to last picture of each request that was served, in order.

    Attributes:
        policy: how it was served.
        load: offered pictures a second over what the engine can draw, batched by step.
        seed: of the traffic; the same seed and load are the same requests for every policy.
        arrived, refused: numbers of requests; those not refused are served.
        pictures: those of all requests that were served.
        seconds: from the start to the last picture.
        others: CPU cores that other processes used meanwhile; None where that is unknown.
        ticks, lanes, busy: network calls, the lanes of all together, and their seconds; 0 where they are not seen.
    """

    policy: str
    load: float
    seed: int
    arrived: int
    refused: int
    pictures: int
    seconds: float
    latencies: list[float]
    others: float | None = None
    ticks: int = 0
    lanes: int = 0
    busy: float = 0.0

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return self.pictures / self.seconds

    @property
    def refusals(self) -> float:
        """Percent of requests."""
        return 100 * self.refused / self.arrived

    def latency(self, name: str) -> float:
        """Return seconds, at "p50", "p95" or "p99"."""
        return quantile(self.latencies, QUANTILES[name])

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)


def quantile(values: Iterable[float], part: float) -> float:
    """Return the smallest value that at least this part of them does not exceed; of one value or more."""
    ordered = sorted(values)
    rank = math.ceil(part * len(ordered) - 1e-9)  # 0.07 * 100 is above 7
    return ordered[max(rank, 1) - 1]


def select(outcomes: Iterable[Outcome], policy: str, load: float) -> dict[int, Outcome]:
    """Return a policy's outcomes at a load, by seed."""
    return {one.seed: one for one in outcomes if (one.policy, one.load) == (policy, load)}


def loads_of(outcomes: Iterable[Outcome]) -> list[float]:
    """Return the loads that were tried, each once, in order."""
    return sorted({one.load for one in outcomes})


def in_common(ours: Collection[int], theirs: Collection[int]) -> list[int]:
    """Return seeds that both have: only the same traffic is compared."""
    return sorted(set(ours) & set(theirs))
