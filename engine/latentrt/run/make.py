"""From a request to jobs that have everything they need."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.images.given import hint_size
from latentrt.model.conditioners.adapters import lora_facts
from latentrt.model.conditioners.ip_adapter import ip_adapter_facts, prepared_prompts
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.request import Request
from latentrt.run.facts import facts_of
from latentrt.run.job import Job
from latentrt.run.stages import later_stages, table_of
from latentrt.sampling.noise import NoiseSource, TorchCudaNoise, noise_source
from latentrt.sampling.table import Kept, Table
from latentrt.sampling.variation import Variation


def make_jobs(
    model: Model,
    request: Request,
    given: Given | None = None,
    *,
    first: int = 0,
    draws_on_device: bool = False,
    tokens: bool = False,
    refiner: Model | None = None,
) -> list[Job]:
    """Return the jobs of a request, not yet admitted; picture i has seed `request.seed + first + i`.

    Args:
        model: the model that draws.
        request: the request.
        given: the picture to begin on, if it is encoded already; None encodes the request's own.
        first: the number of pictures before these.
        draws_on_device: leave first latents to the device where it can make their noise itself.
        tokens: leave texts to text encoders on the device; see `Model.inputs`.
        refiner: the model that takes over where the request has a handoff.

    Raises:
        RequestError: a setting is out of range, or the model cannot do it.
        UnknownSolverError, ScheduleError: the solver or one of its options is unknown or does not fit.
        PlanError: the decoder has no plan for the picture's tiles.
    """
    request = model.filled(request, refiner.fields if refiner is not None and request.handoff is not None else ())
    if given is None:
        given = model.given(request.pictures, request)
    request = prepared_prompts(_placed(model, request, given), model.ip_adapters)
    table = table_of(model, request, denoising_end=1.0 if request.handoff is None else request.handoff)
    later = later_stages(model, request, given, refiner)
    guidance = model.guidance(request)
    size = model.spec.latents.pixels_of(request.height, request.width)
    final = model.spec.latents.enlarged(*size, request.hires_scale or 1.0)
    height, width = model.spec.latents.shape_of(*final)[1:]
    model.check_tiles(height, width)
    facts = {**model.facts(height, width), **(given.facts if given else {})}
    facts |= {**lora_facts(request, model.adapters), **ip_adapter_facts(request, model.ip_adapters)}
    hints, jobs = model.hints(request, given), []
    for index in range(first, first + request.count):
        varied = request.subseed_strength > 0
        seed = request.seed if varied else request.seed + index
        noise = noise_source(request.noise, seed)
        other = noise_source(request.noise, request.subseed + index)
        variation = Variation(noise, other, request.subseed_strength) if varied else None
        drawn = model.drawn_first(request, given, noise)
        on_device = draws_on_device and (given is None or model.shows_picture) and isinstance(noise, TorchCudaNoise)
        on_device &= not (request.seed_delta or varied)
        latents, kept = _begin(model, request, table, given, noise, variation, on_device=on_device)
        told = model.conditions(request, given, noise, drawn, tokens=tokens)
        controls = model.applied(request, hints, told, len(table))
        if controls:
            facts["control"] = {name: own for one in controls for name, own in one.facts.items()}
        told = told if tokens else model.hoisted(told)
        predictor, sides, rows, controls = model.chained(controls, told, table)
        tag = facts_of(request, table.solver, seed, index, size, model.spec.id)
        start = table.start if on_device else 0.0
        if request.seed_delta:
            noise = noise_source(request.noise, (seed + request.seed_delta) % 2**64)
        jobs.append(
            Job(
                rows,
                latents,
                sides.uncond,
                sides.cond,
                noise,
                guidance,
                sides.image,
                controls,
                kept=kept,
                overlay=None if given is None else given.overlay,
                start=start,
                predictor=predictor,
                later=later,
                made_with=model.networks.bundle,
                tag={**tag, **facts},
            )
        )
    return jobs


def check_current(model: Model, jobs: Sequence[Job]) -> None:
    """Refuse jobs whose inputs were computed before the model's weights were changed. Raise RequestError."""
    if any(job.made_with is not None and job.made_with is not model.networks.bundle for job in jobs):
        found, needed = "a job was made before the LoRAs were changed", "jobs that were made after it"
        raise RequestError(found, needed=needed, fix="make them again: engine.requests(...)")


def _placed(model: Model, request: Request, given: Given | None) -> Request:
    """Return the request with the size and the strength that a given picture sets, or the size of a control's."""
    if given is not None:
        return given.sized(request) if model.shows_picture else given.on(request)
    if request.control and None in (request.height, request.width):
        steps = (one.spec.latents.step for one in model.controls if one.name in request.control)
        step = math.lcm(model.spec.latents.step, *steps)
        height, width = hint_size(next(iter(request.control.values())).image, step)
        request = replace(request, height=request.height or height, width=request.width or width)
    if request.strength is not None:
        raise RequestError(
            f"strength is {request.strength:g} and there is no picture",
            needed="a picture to start from",
            fix="pass one: image=, --image",
        )
    return request


def _begin(
    model: Model,
    request: Request,
    table: Table,
    given: Given | None,
    noise: NoiseSource,
    variation: Variation | None,
    *,
    on_device: bool,
) -> tuple[NDArray[np.float32], Kept | None]:
    """Return a job's first latents, and what it keeps of a given picture."""
    if given is not None and not model.shows_picture:
        first = noise.normal if variation is None else variation.first
        return given.begin(table, noise, request.strength or 1.0, first=first, blends=not model.reads_masks)
    shape = model.spec.latents.shape_of(request.height, request.width)
    if on_device:
        return np.zeros(shape, np.float32), None
    unit = noise.normal(shape) if variation is None else variation.first(shape)
    return unit * np.float32(table.start), None
