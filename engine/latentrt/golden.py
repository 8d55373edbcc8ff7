"""Golden runs: small runs whose latents are known, the cheapest proof that a bundle works on this machine."""

from __future__ import annotations

import math

import numpy as np

from latentrt.bundle.manifest import Golden
from latentrt.engine import Engine
from latentrt.sampling.table import tabulate

RUNS = (("a red apple", "", 4, 7, 3.0), ("a", "blurry", 2, 2**32, 1.0))  # prompt, negative, steps, seed, guidance
SIDE = 16  # of the latents at most, so that a full-size model's runs take seconds on a CPU
FIRST = 8
TOLERANCE = 1e-3  # what another CPU's or backend's float32 may differ by, relative to the latents' standard deviation


def measure(engine: Engine) -> tuple[Golden, ...]:
    """Run the golden prompts with the solver of the bundle's own scheduler class and note their final latents."""
    solver = tabulate(None, engine.schedule, 1).solver
    return tuple(_run(engine, solver, *run) for run in RUNS)


def worst_error(engine: Engine) -> float:
    """The largest difference from the bundle's golden runs, relative to their latents' standard deviation.

    Each is repeated with the solver it names. NaN if the bundle has none, or a run is not finite.
    """
    return float(np.max([_difference(_repeat(engine, known), known) for known in engine.spec.golden] or [math.nan]))


def _run(engine: Engine, solver: str, prompt: str, negative: str, steps: int, seed: int, guidance: float) -> Golden:
    latents = engine.spec.latents
    height, width = (min(side, SIDE) * latents.factor for side in (latents.height, latents.width))
    settings = {"solver": solver, "negative_prompt": negative, "steps": steps, "seed": seed, "guidance": guidance}
    settings |= {"height": height, "width": width}
    (job,) = engine.requests([prompt], settings)
    engine.run([job])
    x = job.latents.astype(np.float64)
    first = tuple(float(f"{value:.6g}") for value in x.ravel()[:FIRST])
    mean, std = (float(f"{value:.6g}") for value in (x.mean(), x.std()))
    return Golden(prompt, negative, solver, steps, seed, guidance, mean, std, first)


def _repeat(engine: Engine, run: Golden) -> Golden:
    return _run(engine, run.solver, run.prompt, run.negative_prompt, run.steps, run.seed, run.guidance)


def _difference(now: Golden, known: Golden) -> float:
    ours, theirs = (np.array([run.mean, run.std, *run.first]) for run in (now, known))
    return float(np.max(np.abs(ours - theirs))) / known.std  # numpy's maximum keeps NaN, Python's loses it
