"""Golden runs: small runs whose latents are known, the cheapest proof that a bundle works on this machine."""

from __future__ import annotations

import math

import numpy as np

from engine.pipeline import Engine
from engine.spec import Golden

RUNS = (("a red apple", "", 4, 7, 3.0), ("a", "blurry", 2, 2**32, 1.0))  # prompt, negative, steps, seed, guidance
SIDE = 16  # of the latents at most, so that a full-size model's runs take seconds on a CPU
FIRST = 8
TOLERANCE = 1e-3  # what another CPU's or backend's float32 may differ by, relative to the latents' standard deviation


def measure(engine: Engine) -> tuple[Golden, ...]:
    """Run the golden prompts with the bundle's own solver and note their final latents."""
    return tuple(_run(engine, *run) for run in RUNS)


def worst_error(engine: Engine) -> float:
    """The largest difference from the bundle's golden runs, relative to their latents' standard deviation.

    NaN if the bundle has none.
    """
    return max((_difference(_run(engine, *_inputs(known)), known) for known in engine.spec.golden), default=math.nan)


def _run(engine: Engine, prompt: str, negative: str, steps: int, seed: int, guidance: float) -> Golden:
    latents = engine.spec.latents
    height, width = (min(side, SIDE) * latents.factor for side in (latents.height, latents.width))
    settings = {"negative_prompt": negative, "steps": steps, "seed": seed, "guidance": guidance}
    settings |= {"height": height, "width": width}
    (job,) = engine.requests([prompt], settings)
    engine.run([job])
    x = job.latents.astype(np.float64)
    first = tuple(float(f"{value:.6g}") for value in x.ravel()[:FIRST])
    mean, std = (float(f"{value:.6g}") for value in (x.mean(), x.std()))
    return Golden(prompt, negative, job.table.solver, steps, seed, guidance, mean, std, first)


def _inputs(known: Golden) -> tuple[str, str, int, int, float]:
    return known.prompt, known.negative_prompt, known.steps, known.seed, known.guidance


def _difference(now: Golden, known: Golden) -> float:
    pairs = zip((now.mean, now.std, *now.first), (known.mean, known.std, *known.first), strict=True)
    return max(abs(a - b) for a, b in pairs) / known.std
