"""Random and given runs of diffusers' schedulers, and how far a table is from one.

`latentrt_export.verify.exact` walks the scheduler: as shipped, or exactly, in float64.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import Table, advance, blend, noised
from latentrt_export.verify.checks import Array, difference
from latentrt_export.verify.exact import Walk, noises, numpy_of
from latentrt_export.verify.reference import diffusers_scheduler, scheduler_of

SHAPE = (1, 4, 8, 8)


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


def scheduler(name: str, base: Mapping[str, Any], **options: Any) -> Any:
    """Return the diffusers scheduler that a solver of ours stands for, without the solver's own arguments."""
    settings = {key: value for key, value in options.items() if key not in SOLVERS[name].arguments}
    return copy.deepcopy(_made(name, json.dumps(base), json.dumps(settings)))


@lru_cache(maxsize=4)  # some of them need 50 ms to be made
def _made(name: str, base: str, settings: str) -> Any:
    return diffusers_scheduler(name, scheduler_of(Schedule(json.loads(base))), **json.loads(settings))


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
    first = 0 if given is None else steps - min(int(steps * given), steps)
    own = {key: value for key, value in options.items() if key in SOLVERS[name].arguments}
    theirs = Walk(scheduler(name, base, **options), steps, exact=exact, seed=seed, first=first, **own)
    timesteps, add_noise = theirs.timesteps, theirs.scheduler.add_noise
    rng = np.random.default_rng(7)

    def draw() -> torch.Tensor:
        return theirs.tensor(rng.standard_normal(SHAPE).astype(np.float32))

    gain, drift = draw(), draw()
    x = draw() * theirs.start
    clean, unit, drawn = (draw() for _ in range(3)) if given is not None else (None,) * 3
    mask = None if drawn is None or not masked else (drawn > 0.5).as_subclass(torch.Tensor).to(drawn.dtype)
    if clean is not None:
        x = add_noise(clean, unit, timesteps[:1])
    latents, inputs, returned = [x], [], []
    for index in range(len(timesteps)):

        def network(shown: torch.Tensor, left: float = 1 - index / len(timesteps)) -> torch.Tensor:
            smooth = gain * torch.tanh(shown) + drift * left
            return smooth if outputs == "network" else draw()

        shown, out, x = theirs.step(index, x, network)
        if mask is not None:
            last = index == len(timesteps) - 1
            known = clean if last else add_noise(clean, unit, timesteps[index + 1 : index + 2])
            x = (1 - mask) * known + mask * x
        latents.append(x)
        inputs.append(shown)
        returned.append(out)
    arrays = [[numpy_of(tensor) for tensor in tensors] for tensors in (latents, inputs, returned)]
    edit = [None if tensor is None else numpy_of(tensor) for tensor in (clean, unit, mask)]
    return Run(timesteps, theirs.start, *arrays, *edit)


def follow(table: Table, run: Run, *, dtype: type[np.floating[Any]], seed: int = 0) -> Errors:
    """Advance a table on the outputs of a run, in `dtype`, and compare after every row."""
    assert len(table) == len(run.outputs)
    draws = noises(seed, SHAPE)
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
    error = difference(ours, theirs)
    return error if np.isfinite(error) else np.inf
