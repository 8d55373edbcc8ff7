"""Time an engine on this machine: the figures of `latentrt bench`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from latentrt.engine import Engine
from latentrt.errors import RequestError
from latentrt.golden import example
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes


class Stopwatch:
    """Wraps a function and adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.seconds = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*arguments, **named)
        finally:
            self.seconds += time.perf_counter() - start


def measure(engine: Engine, batches: Sequence[int], *, steps: int = 20, repeats: int = 5) -> dict[str, Any]:
    """Measure latency by batch size, guidance on, the bundle's own solver.

    Returns:
        {"model", "backend", "device", "steps", "repeats", "batches": [...]}; each batch has "step_ms" as (min, median,
        max) over its runs' mean step, "images_per_second" (denoising and decoding), "host_percent" (the part of a
        step that is not the UNet call; None on a GPU, where the host does not see it) and "decode_ms" a picture.

    Raises:
        RequestError: a number below 1, or no batch.
    """
    if not batches or min(steps, repeats, *batches) < 1:
        raise RequestError(
            f"steps {steps}, repeats {repeats}, batches {list(batches)}",
            needed="numbers of 1 or more",
            fix="raise the one below 1",
        )
    rows = [_measure_batch(engine, size, steps, repeats) for size in batches]
    about = {"model": engine.spec.id, "backend": engine.backend.name, "device": engine.backend.device}
    return {**about, "steps": steps, "repeats": repeats, "batches": rows}


def _measure_batch(engine: Engine, size: int, steps: int, repeats: int) -> dict[str, Any]:
    runs = [_run(engine, size, steps) for _ in range(repeats + 1)][1:]  # the first one warms up
    step_ms = sorted(run["denoise"] / steps * 1000 for run in runs)
    seen = engine.backend.gpu is None
    return {
        "batch": size,
        "step_ms": (step_ms[0], median(step_ms), step_ms[-1]),
        "images_per_second": median(size / (run["denoise"] + run["decode"]) for run in runs),
        "host_percent": median((1 - run["unet"] / run["denoise"]) * 100 for run in runs) if seen else None,
        "decode_ms": median(run["decode"] / size * 1000 for run in runs),
    }


def _run(engine: Engine, size: int, steps: int) -> Mapping[str, float]:
    watch, most = Stopwatch(engine.model.predictor), engine.model.most_lanes
    denoiser = engine.denoiser if engine.backend.gpu is not None else Denoiser(HostLanes(watch, most * size))
    latents, prompted = engine.spec.latents, engine.model.text is not None
    settings, pictures = example(engine.model, max(latents.height, latents.width))
    settings |= {"steps": steps, "count": size}
    settings |= {"guidance": 3.0} if prompted else {}
    settings |= {"negative_prompt": "a"} if "negative_prompt" in engine.model.fields else {}
    jobs = engine.requests(["" if prompted else None], settings, pictures)
    start = time.perf_counter()
    denoiser.run(jobs)
    denoised = time.perf_counter()
    for job in jobs:
        engine.decode(job.latents)
    return {"unet": watch.seconds, "denoise": denoised - start, "decode": time.perf_counter() - denoised}
