"""diffusers' schedulers, run as its pipelines run them: the reference for tables.

A scheduler runs in one of two ways. As shipped, its numbers are float32. Exact, its float32 settings are cast to
float64 and its own casts down are undone: then only its mathematics is left, and a table agrees to 1e-9 or better.
The two together tell an error of ours from a rounding error of theirs.
"""

from __future__ import annotations

import copy
import inspect
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from latentrt.sampling.schedule import TINY_ALPHA_CUMPROD, Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import Table, advance, blend, noised

SHAPE = (1, 4, 8, 8)
Array = NDArray[Any]


@dataclass(frozen=True)
class Run:
    """One run of a diffusers scheduler: `latents` has one entry more than the calls.

    `clean` and `noise` are those of a given picture; `mask` is what was repainted of it, None if all.
    """

    timesteps: torch.Tensor
    start: float
    latents: list[Array]
    inputs: list[Array]
    outputs: list[Array]
    clean: Array | None = None
    noise: Array | None = None
    mask: Array | None = None


@dataclass(frozen=True)
class Errors:
    """Worst differences of a table from a run, over all rows, relative to the largest number of that row."""

    latents: float
    inputs: float
    start: float
    timesteps: float  # absolute

    @property
    def worst(self) -> float:
        return max(self.latents, self.inputs, self.start)


class _Float64(torch.Tensor):
    """A tensor that no scheduler can cast down."""

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self


def scheduler(name: str, base: Mapping[str, Any], **options: Any) -> Any:
    """Return the diffusers scheduler of a solver of ours, made from the config as a user would make it."""
    solver = SOLVERS[name]
    settings = {key: value for key, value in options.items() if key not in solver.arguments}
    return copy.deepcopy(_made(solver.scheduler, json.dumps(base), json.dumps({**solver.settings, **settings})))


@lru_cache(maxsize=4)  # some of them take 50 ms to make
def _made(class_name: str, base: str, settings: str) -> Any:
    return getattr(diffusers, class_name).from_config(json.loads(base), **json.loads(settings))


def walk(
    name: str,
    base: Mapping[str, Any],
    steps: int,
    *,
    exact: bool,
    outputs: str,
    seed: int = 0,
    given: float | None = None,
    masked: bool = False,
    **options: Any,
) -> Run:
    """Run diffusers' scheduler for a solver.

    Args:
        outputs: "network" for a smooth function of the network's inputs, as a network gives; "random" for noise
            independent of them, which brings out every wrong coefficient but also every rounding error.
        given: the strength of a run that begins on a given picture, as in the image-to-image pipelines.
        masked: a part of that picture is kept, as in the inpainting pipelines.
    """
    theirs = scheduler(name, base, **options)
    if exact:
        theirs.alphas_cumprod = _alphas_cumprod(theirs, name, base, options)
    theirs.set_timesteps(steps)
    first = (0 if given is None else steps - min(int(steps * given), steps)) * theirs.order
    timesteps = theirs.timesteps[first:]
    if hasattr(theirs, "set_begin_index"):  # else the index is looked up by timestep and fails where two are equal
        theirs.set_begin_index(first)
    if exact:
        _cast_up(theirs)
    rng = np.random.default_rng(7)
    gain, drift = _tensor(rng, exact), _tensor(rng, exact)
    x = _tensor(rng, exact) * float(theirs.init_noise_sigma)
    clean, unit, drawn = (_tensor(rng, exact) for _ in range(3)) if given is not None else (None,) * 3
    mask = None if drawn is None or not masked else (drawn > 0.5).as_subclass(torch.Tensor).to(drawn.dtype)
    if clean is not None:
        x = theirs.add_noise(clean, unit, timesteps[:1])
    latents, inputs, returned = [x], [], []
    arguments = _arguments(name, theirs, seed, options)
    with mock.patch.object(sys.modules[type(theirs).__module__], "randn_tensor", _drawer(seed, exact), create=True):
        for index, t in enumerate(timesteps):
            shown = theirs.scale_model_input(x, t)
            network = gain * torch.tanh(shown) + drift * (1 - index / len(timesteps))
            out = network if outputs == "network" else _tensor(rng, exact)
            # LCM makes float32 coefficients of a tensor's timestep, float64 of a number's.
            x = theirs.step(out, int(t) if exact and name == "lcm" else t, x, **arguments).prev_sample
            if mask is not None:
                last = index == len(timesteps) - 1
                known = clean if last else theirs.add_noise(clean, unit, timesteps[index + 1 : index + 2])
                x = (1 - mask) * known + mask * x
            latents.append(x)
            inputs.append(shown)
            returned.append(out)
    arrays = [[_numpy(tensor) for tensor in tensors] for tensors in (latents, inputs, returned)]
    edit = [None if tensor is None else _numpy(tensor) for tensor in (clean, unit, mask)]
    return Run(timesteps, float(theirs.init_noise_sigma), *arrays, *edit)


def follow(table: Table, run: Run, *, dtype: type[np.floating[Any]], exact: bool, seed: int = 0) -> Errors:
    """Advance a table on the outputs of a run, in `dtype`, and compare after every row."""
    assert len(table) == len(run.outputs)
    draws = _draws(seed, exact)
    x, memory = run.latents[0].astype(dtype), np.full((4, *SHAPE), np.nan, dtype)
    latents, inputs = 0.0, 0.0
    if run.clean is not None:
        latents = relative(noised(table.known[0], run.clean.astype(dtype), run.noise.astype(dtype)), x)
    rows = zip(table.rows, run.inputs, run.outputs, run.latents[1:], table.known[1:], strict=True)
    for row, shown, out, after, level in rows:
        inputs = max(inputs, relative(dtype(row.c_in) * x, shown))
        x = advance(row, x, out.astype(dtype), memory, next(draws).astype(dtype) if row.c else None)
        if run.mask is not None:
            x = blend(level, x, *(array.astype(dtype) for array in (run.mask, run.clean, run.noise)))
        latents = max(latents, relative(x, after))
    timesteps = float(np.abs(table.timesteps - run.timesteps.double().numpy()).max())
    return Errors(latents, inputs, abs(table.start / run.start - 1), timesteps)


def relative(ours: Array, theirs: Array) -> float:
    """Return the largest difference, relative to the largest number; infinite where either is not finite."""
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    return error if np.isfinite(error) else np.inf


def _tensor(rng: np.random.Generator, exact: bool) -> torch.Tensor:
    tensor = torch.from_numpy(rng.standard_normal(SHAPE).astype(np.float32))
    return tensor.double().as_subclass(_Float64) if exact else tensor


def _numpy(tensor: torch.Tensor) -> Array:
    return tensor.as_subclass(torch.Tensor).numpy()


def _arguments(name: str, theirs: Any, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in options.items() if key in SOLVERS[name].arguments}
    if "generator" in inspect.signature(theirs.step).parameters:
        own["generator"] = torch.Generator().manual_seed(seed)
    return own


def _drawer(seed: int, exact: bool) -> Any:
    """Return a stand-in for diffusers' `randn_tensor`; as shipped it draws from the generator that `step` was given."""
    if not exact:
        return lambda shape, generator, device, dtype: torch.randn(shape, generator=generator, dtype=dtype)
    draws = _draws(seed, exact)
    return lambda *_, **__: torch.from_numpy(next(draws)).as_subclass(_Float64)


def _draws(seed: int, exact: bool) -> Iterator[Array]:
    """Yield latentrt's noise: float32 from torch's generator; float64 has no counterpart there, so any will do."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    while True:
        yield rng.standard_normal(SHAPE) if exact else torch.randn(SHAPE, generator=generator).numpy()


def _alphas_cumprod(theirs: Any, name: str, base: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
    """Return theirs in float64. Rescaled betas are ours: torch's float32 square root is not rounded as numpy's is."""
    if not getattr(theirs.config, "rescale_betas_zero_snr", False) or "beta_start" not in base:
        return theirs.alphas_cumprod.double()
    settings = {key: value for key, value in options.items() if key not in SOLVERS[name].arguments}
    schedule = Schedule.from_config(base)
    ours = schedule.alphas_cumprod(schedule.settings(SOLVERS[name].scheduler, **settings)).copy()
    if hasattr(theirs, "sigmas"):
        ours[-1] = TINY_ALPHA_CUMPROD
    return torch.from_numpy(ours)


def _cast_up(theirs: Any) -> None:
    for key in ("one", "final_alpha_cumprod", "sigmas"):
        if hasattr(theirs, key):
            setattr(theirs, key, getattr(theirs, key).double())
    if hasattr(theirs, "final_alpha_cumprod") and theirs.final_alpha_cumprod < 1:
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    if hasattr(theirs, "sigmas_up"):
        _dpm2_ancestral_sigmas(theirs)
    elif hasattr(theirs, "sigmas_interpol"):
        _dpm2_sigmas(theirs)


def _dpm2_sigmas(theirs: Any) -> None:
    """Derive again, in float64, what KDPM2DiscreteScheduler.set_timesteps derives from its sigmas."""
    sigmas = torch.cat([theirs.sigmas[:1], theirs.sigmas[1:-1:2]])
    theirs.sigmas_interpol = _twice(sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp())


def _dpm2_ancestral_sigmas(theirs: Any) -> None:
    """Derive again, in float64, what KDPM2AncestralDiscreteScheduler.set_timesteps derives from its sigmas."""
    here = torch.cat([theirs.sigmas[:1], theirs.sigmas[1:-1:2]])
    there = torch.cat([here[1:], torch.zeros(1)])
    up = (there**2 * (here**2 - there**2) / here**2).sqrt()
    down = (there**2 - up**2).sqrt()
    up[-1] = down[-1] = 0.0
    middle = here.log().lerp(down.log(), 0.5).exp()
    middle[-2:] = 0.0
    theirs.sigmas_up, theirs.sigmas_down, theirs.sigmas_interpol = _twice(up), _twice(down), _twice(middle)


def _twice(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])
