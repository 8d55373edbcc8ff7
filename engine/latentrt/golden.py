"""Golden runs: small runs whose latents are known, the cheapest test that a bundle works on this machine."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentrt.bundle.golden import Golden
from latentrt.engine import Engine
from latentrt.model.model import Model
from latentrt.sampling.table import tabulate

RUNS = (("a red apple", "", 4, 7, 3.0), ("a", "blurry", 2, 2**32, 1.0))  # prompt, negative, steps, seed, guidance
SIDE = 16  # of the latents at most, so that a full-size model's runs take seconds on a CPU
FIRST = 8
TOLERANCE = 1e-3  # of another CPU's or backend's float32, relative to the latents' standard deviation


def measure(engine: Engine) -> tuple[Golden, ...]:
    """Run the golden prompts with the bundle's own solver, or that of `example`; return them as golden runs."""
    own = example(engine.model, SIDE)[0].get("solver", engine.spec.defaults.solver)
    solver = tabulate(own, engine.schedule, 1).solver
    return tuple(_run(engine, solver, *run) for run in RUNS)


def worst_error(engine: Engine) -> float:
    """Return the largest difference from the bundle's golden runs, relative to their latents' standard deviation.

    Each is repeated with the solver it names. NaN if the bundle has none, or a run is not finite.
    """
    return float(np.max([_difference(engine, known) for known in engine.spec.golden] or [math.nan]))


def example(model: Model, side: int, *, least: int = 1) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings and pictures that any request to a model needs besides a prompt, for a small picture.

    Args:
        model: the model that draws.
        side: of the latents at most.
        least: of the latents, also where the model's own size is less.
    """
    latents = model.spec.latents
    sides = [
        max(min(own, side), least) // latents.multiple * latents.multiple for own in (latents.height, latents.width)
    ]
    height, width = (max(each, latents.multiple) * latents.factor for each in sides)
    settings: dict[str, Any] = {"height": height, "width": width}
    if model.spec.defaults.solver is None and model.schedule.not_served():
        settings["solver"] = "euler"
    if "class_label" in model.fields:
        settings["class_label"] = 0
    ramp = np.add.outer(np.linspace(0, 128, height), np.linspace(0, 127, width)).astype(np.uint8)
    image = np.stack([ramp, ramp[::-1], ramp[:, ::-1]], axis=-1)
    mask = np.broadcast_to(np.arange(width) < width // 2, (height, width))
    pictures = {
        "image": image[:: model.enlarges, :: model.enlarges],
        "mask": mask,
        "depth": ramp,
    }
    return settings, {name: pictures[name] for name in model.pictures}


def _run(engine: Engine, solver: str, prompt: str, negative: str, steps: int, seed: int, guidance: float) -> Golden:
    settings, pictures = example(engine.model, SIDE)
    settings |= {"solver": solver, "steps": steps, "seed": seed}
    prompted = engine.model.text is not None
    if prompted:
        settings["guidance"] = guidance
    else:
        prompt, guidance = "", 1.0
    if "negative_prompt" in engine.model.fields:
        settings["negative_prompt"] = negative
    else:
        negative = ""
    (job,) = engine.requests([prompt if prompted else None], settings, pictures)
    engine.run([job])
    x = job.latents.astype(np.float64)
    first = tuple(float(f"{value:.6g}") for value in x.ravel()[:FIRST])
    mean, std = (float(f"{value:.6g}") for value in (x.mean(), x.std()))
    return Golden(prompt, negative, solver, steps, seed, guidance, mean, std, first)


def _difference(engine: Engine, known: Golden) -> float:
    asked = known.prompt, known.negative_prompt, known.steps, known.seed, known.guidance
    now = _run(engine, known.solver, *asked)
    ours, theirs = (np.array([run.mean, run.std, *run.first]) for run in (now, known))
    return float(np.max(np.abs(ours - theirs))) / known.std  # numpy's maximum keeps NaN, Python's loses it
