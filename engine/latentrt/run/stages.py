"""The parts of a run: the table of each, and what comes after the first one (hires fix, a refiner)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.errors import BundleError, RequestError
from latentrt.model.conditioners.adapters import without_adapters
from latentrt.model.given import Given
from latentrt.model.model import Model
from latentrt.request import Request
from latentrt.run.job import Stage
from latentrt.runtime.base import Backend
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource, noise_source
from latentrt.sampling.table import Table, noised, tabulate

Float32 = NDArray[np.float32]


def table_of(model: Model, request: Request, *, denoising_start: float = 0.0, denoising_end: float = 1.0) -> Table:
    """Return the table of a request whose defaults are filled in. Raise as `tabulate`."""
    table = tabulate(
        request.solver,
        model.schedule,
        request.steps or 1,
        strength=1.0 if request.strength is None else request.strength,
        keeps_steps=model.spec.keeps_steps,
        denoising_start=denoising_start,
        denoising_end=denoising_end,
        **request.options,
    )
    scalars = model.scalars(request, table)
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


def later_stages(model: Model, request: Request, given: Given | None, refiner: Model | None) -> tuple[Stage, ...]:
    """Return the stages after the first one of a request whose defaults are filled in.

    Raises:
        RequestError: the engine, or what is asked besides, does not allow them.
    """
    if request.hires_scale is not None:
        if given is not None or request.handoff is not None:
            raise RequestError(
                f"there is a hires_scale, and {'a handoff' if given is None else 'a picture to begin on'}",
                needed="one of them",
                fix="enlarge the picture, and begin on that" if given is not None else "leave one out",
            )
        return (_hires(model, request, request.hires_scale),)
    if request.handoff is None:
        return ()
    if refiner is None:
        raise RequestError("there is a handoff and no refiner", needed="one", fix="load it: refiner=, --refiner")
    if given is not None and given.mask is not None:
        raise RequestError("there are a handoff and a mask", needed="one of them")
    return (_refined(model, refiner, request, request.handoff),)


def refiner_of(model: Model, bundle: Bundle, backend: Backend, *, resident: bool) -> Model:
    """Load the model that takes over from another.

    Raises:
        BundleError: it denoises other latents.
    """
    refiner = Model(bundle, backend, resident=resident)
    own, needed = refiner.spec.latents, model.spec.latents
    if (own.channels, own.factor, own.scale, own.shift) != (needed.channels, needed.factor, needed.scale, needed.shift):
        refiner.close()
        raise BundleError(
            f"the refiner {refiner.spec.id} has {own.channels} channels, factor {own.factor}, scale {own.scale:g}",
            needed=f"{needed.channels} channels, factor {needed.factor}, scale {needed.scale:g}, as {model.spec.id}",
        )
    return refiner


def _hires(model: Model, request: Request, scale: float) -> Stage:
    """Return the run on enlarged latents: A1111's hires fix with its upscaler "Latent", as diffusers' image-to-image
    pipelines run on latents.
    """
    height, width = model.spec.latents.enlarged(request.height, request.width, scale)
    second = replace(
        request, height=height, width=width, steps=request.hires_steps or request.steps, strength=request.hires_strength
    )
    table = table_of(model, second)
    told = model.conditions(second, None, noise_source(request.noise, request.seed))
    applied = model.applied(second, model.hints(second, None), told, len(table))
    predictor, sides, rows, controls = model.chained(applied, model.hoisted(told), table)
    shape = model.spec.latents.shape_of(height, width)

    def begin(latents: Float32, noise: NoiseSource) -> Float32:
        return noised(table.known[0], enlarged(latents, shape[1], shape[2]), noise.normal(shape))

    guidance = model.guidance(second)
    return Stage(rows, sides.uncond, sides.cond, begin, guidance, predictor, sides.image, controls, shape)


def _refined(model: Model, refiner: Model, request: Request, handoff: float) -> Stage:
    """Return the rest of the run by a refiner, as diffusers' denoising_start has it."""
    alone = replace(without_adapters(request), control={}, ip_adapter={}, handoff=None, strength=None)
    own = refiner.filled(alone, model.fields)
    table = table_of(refiner, own, denoising_start=handoff)
    sides = refiner.hoisted(refiner.conditions(own, None, noise_source(request.noise, request.seed)))
    guidance, predictor = refiner.guidance(own), refiner.predictor
    return Stage(table, sides.uncond, sides.cond, lambda latents, noise: latents, guidance, predictor, sides.image)


def enlarged(latents: Float32, height: int, width: int) -> Float32:
    """Return (channels, height, width) latents at another size, bilinear, as torch.nn.functional.interpolate has it."""
    rows, columns = (_weights(old, new) for old, new in zip(latents.shape[1:], (height, width), strict=True))
    return np.asarray(rows @ latents @ columns.T, np.float32)


def _weights(old: int, new: int) -> Float32:
    """Return the (new, old) matrix that interpolates one side; pixels are points in the middle of their squares."""
    places = np.maximum((np.arange(new) + 0.5) * (old / new) - 0.5, 0)
    below = places.astype(int)
    matrix = np.zeros((new, old), np.float32)
    np.add.at(matrix, (np.arange(new), below), 1 - (places - below))
    np.add.at(matrix, (np.arange(new), np.minimum(below + 1, old - 1)), places - below)
    return matrix
