"""From a request to jobs that have everything they need."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import RequestError
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.request import Request, facts_of
from latentrt.run.job import Job
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource, TorchCudaNoise, noise_source
from latentrt.sampling.table import Kept, Table, tabulate


def make_jobs(
    model: Model,
    request: Request,
    given: Given | None = None,
    *,
    first: int = 0,
    draws_on_device: bool = False,
    tokens: bool = False,
) -> list[Job]:
    """Return the jobs of a request, not yet admitted; picture i has seed `request.seed + first + i`.

    Args:
        model: the model that draws.
        request: the request.
        given: the picture to begin on, if it is encoded already; None encodes the request's own.
        first: the number of pictures before these.
        draws_on_device: leave first latents to the device where it can make their noise itself.
        tokens: leave texts to text encoders on the device; see `Model.inputs`.

    Raises:
        RequestError: a setting is out of range, or the model cannot do it.
        UnknownSolverError, ScheduleError: the solver or one of its options is unknown or does not fit.
    """
    request = model.filled(request)
    if given is None:
        given = model.given(request.pictures, request.height, request.width)
    request = _placed(model, request, given)
    table = table_of(model, request)
    guidance = model.guidance(request)
    size = model.spec.latents.pixels_of(request.height, request.width)
    jobs = []
    for index in range(first, first + request.count):
        seed = request.seed + index
        noise = noise_source(request.noise, seed)
        on_device = draws_on_device and (given is None or model.shows_picture) and isinstance(noise, TorchCudaNoise)
        latents, kept = _begin(model, request, table, given, noise, on_device=on_device)
        sides = model.inputs(request, given, noise, tokens=tokens)
        tag = facts_of(request, table.solver, seed, index, size, model.spec.id)
        start = table.start if on_device else 0.0
        jobs.append(
            Job(
                table,
                latents,
                sides.uncond,
                sides.cond,
                noise,
                guidance,
                kept=kept,
                start=start,
                tag={**tag, **(given.facts if given else {})},
            )
        )
    return jobs


def table_of(model: Model, request: Request) -> Table:
    """Return the table of a request whose defaults are filled in. Raise as `tabulate`."""
    strength = 1.0 if request.strength is None else request.strength
    keeps = model.spec.keeps_steps
    steps, options = request.steps or 1, request.options
    table = tabulate(request.solver, model.schedule, steps, strength=strength, keeps_steps=keeps, **options)
    scalars = model.scalars(request, len(table))
    return replace(table, scalars=scalars, shallow=_shallow(request, model.guidance(request), len(table)))


def _shallow(request: Request, guidance: Guidance, rows: int) -> tuple[bool, ...]:
    """Return `Table.shallow`: all rows but every `cache_interval`th, and those where guidance sets in."""
    if request.cache_interval == 1:
        return ()
    kept, shallow = False, list[bool]()
    for row in range(rows):
        guided = guidance.acts(row, rows)
        shallow.append(row % request.cache_interval != 0 and guided <= kept)
        kept = kept if shallow[-1] else guided
    return tuple(shallow)


def _placed(model: Model, request: Request, given: Given | None) -> Request:
    """Return the request with the size and the strength that a given picture sets."""
    if given is not None:
        return given.sized(request) if model.shows_picture else given.on(request)
    if request.strength is not None:
        raise RequestError(
            f"strength is {request.strength:g} and there is no picture",
            needed="a picture to start from",
            fix="pass one: image=, --image",
        )
    return request


def _begin(
    model: Model, request: Request, table: Table, given: Given | None, noise: NoiseSource, *, on_device: bool
) -> tuple[NDArray[np.float32], Kept | None]:
    """Return a job's first latents, and what it keeps of a given picture."""
    if given is not None and not model.shows_picture:
        return given.begin(table, noise, request.strength or 1.0, blends=not model.reads_masks)
    shape = model.spec.latents.shape_of(request.height, request.width)
    if on_device:
        return np.zeros(shape, np.float32), None
    return noise.normal(shape) * np.float32(table.start), None
