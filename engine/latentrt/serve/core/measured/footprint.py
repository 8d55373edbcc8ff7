"""How much memory a picture takes: measured with a picture of a middling size, before a server serves."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from latentrt.bundle.spec import DECODER
from latentrt.engine import Engine
from latentrt.golden import SIDE as SMALL
from latentrt.golden import example
from latentrt.run.job import Job
from latentrt.runtime.machine.memory import free_memory, watched_peak
from latentrt.serve.core.pipeline import Shape
from latentrt.serve.core.rules.budget import Budget, Footprint

SIDES = (64,)  # of the latents: a picture of 512 x 512 pixels, of most models
LARGE = (64, 128, 192)  # where there is time
PART = 0.5  # of the free memory that calls may take: the rest is for all else, and for what was estimated too low
LONG = 20.0  # seconds of a picture after which no larger one is measured


def measured(engine: Engine, sides: Sequence[int] = SIDES) -> dict[Shape, Footprint]:
    """Return the memory that square pictures take, made in one step; nothing where the system does not tell.

    On a GPU one picture of the model's own size is made: the figure is what all lanes, and all else, keep there.

    Args:
        engine: used by nothing else meanwhile.
        sides: of the latents, from small to large; those that would take too much memory or time are left out.

    Raises:
        LatentrtError: the engine does not draw such a picture.
    """
    gpu, own = engine.backend.gpu, engine.spec.latents
    if gpu is not None:
        before, _ = gpu.memory()
        job = _job(engine, max(own.height, own.width))
        engine.run([job])
        engine.picture(job)
        return {own.shape_of(None, None): Footprint(max(0, before - gpu.memory()[0]), 0)}
    tiles = engine.model.tiles
    found: dict[Shape, Footprint] = {}
    engine.run([_job(engine, SMALL)])  # what first calls alone take is none of a picture's
    for side in sides if tiles is None else sorted({min(side, tiles.side) for side in sides}):
        if found and not _budget(engine, found, _part_of_free()).fits(side**2):
            break
        job, start = _job(engine, side, least=side), time.monotonic()
        with watched_peak() as lane:
            engine.run([job])
        with watched_peak() as decoding:
            engine.picture(job)
        if lane.bytes is not None and decoding.bytes is not None:
            channels, height, width = job.latents.shape
            found[channels, height, width] = Footprint(lane.bytes, decoding.bytes)
        if time.monotonic() - start > LONG:
            break
    return found


def _job(engine: Engine, side: int, least: int = 1) -> Job:
    """Return a picture of one row and one lane."""
    settings, pictures = example(engine.model, side, least=least)
    prompt = None if engine.model.text is None else ""
    if pictures and not engine.model.shows_picture:
        settings["strength"] = 1.0  # less may leave none of one step
    (job,) = engine.requests([prompt], {"steps": 1, "guidance": 1.0, **settings}, pictures)
    return job


def budget_of(
    engine: Engine, known: Mapping[Shape, Footprint], memory: int | None, most: int, *, processes: int = 1
) -> Budget:
    """Return what an engine's calls may have; have it decode in tiles what would take too much memory at once.

    Args:
        engine: it is told of the tiles, if it has none.
        known: what was measured of it.
        memory: bytes that calls may take in all; None is half of what is free, on a GPU all.
        most: latents, height times width, of the largest pictures that are asked for.
        processes: that share what is free on the host.
    """
    own, gpu, tiles = engine.spec.latents, engine.backend.gpu, engine.model.tiles
    if memory is None:
        memory = _part_of_free(processes) if gpu is None else gpu.memory()[0]
    budget = _budget(engine, known, memory)
    if gpu is None and tiles is None and engine.spec.named(DECODER):
        budget = budget.tiled(most)
        if budget.tile is not None:
            engine.model.cut_into_tiles(budget.tile * own.factor)
    return budget


def _part_of_free(processes: int = 1) -> int | None:
    free = free_memory()
    return None if free is None else int(free * PART / processes)


def _budget(engine: Engine, known: Mapping[Shape, Footprint], memory: int | None) -> Budget:
    shape, tiles = engine.spec.latents.shape_of(None, None), engine.model.tiles
    fixed, tile = engine.backend.facts.fixed_lanes, None if tiles is None else tiles.side
    mixed = engine.model.adapters
    adapters = 0 if mixed is None else mixed.lane_bytes
    return Budget(engine.denoiser.lanes, shape, memory, known, fixed, tile, adapters)
