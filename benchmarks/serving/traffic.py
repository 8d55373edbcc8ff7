"""What comes in, and what became of it: seeded Poisson arrivals, and the fate of each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from benchmarks.cases import PROMPTS
from benchmarks.serving.clients import quantile

SOLVERS, GUIDANCES, STEPS = ("dpmpp-2m", "unipc", "euler", "ddim"), (1.0, 3.0, 3.0), (10, 30)
QUANTILES = (0.5, 0.95, 0.99)


class Arrival(NamedTuple):
    """One picture that is wanted `at` seconds after the start."""

    at: float
    prompt: str
    seed: int
    steps: int
    solver: str
    guidance: float

    @property
    def body(self) -> dict[str, Any]:
        """The same over HTTP."""
        settings = {"num_inference_steps": self.steps, "scheduler": self.solver, "guidance_scale": self.guidance}
        return {"prompt": self.prompt, "seed": self.seed, **settings}


def arrivals(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Pictures with exponential gaps, so many a second, for that long; the same ones at any rate."""
    dice, found, at = random.Random(seed), list[Arrival](), 0.0
    while at < seconds:
        prompt = f"{dice.choice(PROMPTS)} {len(found)}"
        kind = (dice.randint(*STEPS), dice.choice(SOLVERS), dice.choice(GUIDANCES))
        found.append(Arrival(at, prompt, seed + len(found), *kind))
        at += dice.expovariate(rate)
    return found


@dataclass(frozen=True, slots=True)
class Outcome:
    """One way to serve one traffic: each served picture's seconds from arrival to picture, in order of arrival.

    Attributes:
        policy: how it was served.
        load: offered pictures a second over what the engine can draw, batched by step.
        arrived, refused: pictures; what is not refused is served.
        seconds: from the start to the last picture.
    """

    policy: str
    load: float
    arrived: int
    refused: int
    seconds: float
    latencies: Sequence[float]

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.latencies) / self.seconds

    @property
    def quantiles(self) -> list[float]:
        """Of latency; p50, p95, p99."""
        return [quantile(self.latencies, part) for part in QUANTILES]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
