"""A diffusers scheduler, walked as its pipelines walk it: as shipped, or exactly.

As shipped, its numbers are float32. Exactly, its float32 settings are cast to float64 and its own casts down are
undone: then only its mathematics is left, and a table agrees to 1e-9 or better. The two together tell an error of ours
from a rounding error of theirs.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import diffusers
import torch

from latentrt.sampling.schedule import Schedule
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import Array

ROOT_ROUNDING = 1e-6  # of √ᾱ in float32, through a cumulative product of up to 4000 betas; 9e-7 was measured


class Step(NamedTuple):
    """One call of the network: what it is shown, what it returns, and the latents after the scheduler's step."""

    shown: torch.Tensor
    out: torch.Tensor
    latents: torch.Tensor


class Walk:
    """A diffusers scheduler on its way through a run.

    Args:
        scheduler: changed by the walk; make one for each.
        steps: of the whole run.
        exact: whether it is walked in float64.
        seed: of the noise that it adds; `noises` yields the same.
        first: how many steps are left out, as the image-to-image pipelines do.
        arguments: of the scheduler's `step`.

    Attributes:
        timesteps: of the calls that are left.
        start: what standard normal noise is multiplied by to become the first latents.
    """

    def __init__(
        self, scheduler: Any, steps: int, *, exact: bool, seed: int = 0, first: int = 0, **arguments: Any
    ) -> None:
        self.scheduler, self.exact, self._arguments = scheduler, exact, arguments
        self._generator = torch.Generator().manual_seed(seed)
        if exact and hasattr(scheduler, "alphas_cumprod"):
            scheduler.alphas_cumprod = _levels(scheduler)
        with quiet():
            scheduler.set_timesteps(steps)
        begin = first * scheduler.order
        if hasattr(scheduler, "set_begin_index"):  # a look-up by timestep fails where two are equal
            scheduler.set_begin_index(begin)
        if exact:
            _cast_up(scheduler)
        self.timesteps = scheduler.timesteps[begin:]
        self.start = float(scheduler.init_noise_sigma)
        if "generator" in inspect.signature(scheduler.step).parameters:
            self._arguments["generator"] = self._generator

    def tensor(self, values: Array) -> torch.Tensor:
        """Return an array as the scheduler takes it: in float64, proof against casts, if the walk is exact."""
        tensor = torch.from_numpy(values)
        return tensor.double().as_subclass(_Float64) if self.exact else tensor

    def step(self, index: int, x: torch.Tensor, network: Callable[[torch.Tensor], torch.Tensor]) -> Step:
        """Call a network at a timestep and take the scheduler's step from latents `x`."""
        timestep = self.timesteps[index]
        shown = self.scheduler.scale_model_input(x, timestep)
        out = network(shown)
        if self.exact and isinstance(self.scheduler, diffusers.LCMScheduler):
            timestep = int(timestep)  # its coefficients are float32 if this is a tensor
        with self._drawing_float32():
            return Step(shown, out, self.scheduler.step(out, timestep, x, **self._arguments).prev_sample)

    @contextmanager
    def _drawing_float32(self) -> Iterator[None]:
        """Have an exact scheduler add the noise of float32; of float64, torch would draw other numbers."""
        module: Any = sys.modules[type(self.scheduler).__module__]
        if not self.exact or not hasattr(module, "randn_tensor"):
            yield
            return
        own, module.randn_tensor = module.randn_tensor, self._draw
        try:
            yield
        finally:
            module.randn_tensor = own

    def _draw(self, shape: Sequence[int], **_: Any) -> torch.Tensor:
        return self.tensor(torch.randn(tuple(shape), generator=self._generator).numpy())


class _Float64(torch.Tensor):
    """A tensor that no scheduler can cast down."""

    def to(self, *_: Any, **__: Any) -> torch.Tensor:
        return self


def noises(seed: int, shape: Sequence[int]) -> Iterator[Array]:
    """Yield the noise of a walk, one float32 array after the other."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(tuple(shape), generator=generator).numpy()


def numpy_of(tensor: torch.Tensor) -> Array:
    """Return a tensor of a walk as an array."""
    return tensor.as_subclass(torch.Tensor).numpy()


def _levels(scheduler: Any) -> torch.Tensor:
    """Return a scheduler's ᾱ in float64.

    Where betas were rescaled they are ours, if no further from theirs than rounding takes them: torch's float32 square
    root is not rounded as numpy's is, and the levels next to no signal are differences of nearly equal roots.
    tests/sampling/test_schedule.py measures what is left out so.
    """
    theirs: torch.Tensor = scheduler.alphas_cumprod.double()
    if not scheduler.config.get("rescale_betas_zero_snr"):
        return theirs
    ours = torch.tensor(Schedule({}).alphas_cumprod(scheduler.config))
    ours[-1] = theirs[-1]  # 0, or what a scheduler that divides by it has instead
    return ours if torch.allclose(ours.sqrt(), theirs.sqrt(), rtol=0, atol=ROOT_ROUNDING) else theirs


def _cast_up(scheduler: Any) -> None:
    for key in ("one", "final_alpha_cumprod", "sigmas"):
        if hasattr(scheduler, key):
            setattr(scheduler, key, getattr(scheduler, key).double())
    if hasattr(scheduler, "final_alpha_cumprod") and scheduler.final_alpha_cumprod < 1:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    if hasattr(scheduler, "sigmas_up"):
        _dpm2_ancestral_sigmas(scheduler)
    elif hasattr(scheduler, "sigmas_interpol"):
        _dpm2_sigmas(scheduler)


def _dpm2_sigmas(scheduler: Any) -> None:
    """What KDPM2DiscreteScheduler.set_timesteps derives from its sigmas, again in float64."""
    sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    scheduler.sigmas_interpol = _twice(sigmas.log().lerp(sigmas.roll(1).log(), 0.5).exp())


def _dpm2_ancestral_sigmas(scheduler: Any) -> None:
    """What KDPM2AncestralDiscreteScheduler.set_timesteps derives from its sigmas, again in float64."""
    here = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2]])
    there = torch.cat([here[1:], torch.zeros(1)])
    up = (there**2 * (here**2 - there**2) / here**2).sqrt()
    down = (there**2 - up**2).sqrt()
    up[-1] = down[-1] = 0.0
    middle = here.log().lerp(down.log(), 0.5).exp()
    middle[-2:] = 0.0
    scheduler.sigmas_up, scheduler.sigmas_down, scheduler.sigmas_interpol = _twice(up), _twice(down), _twice(middle)


def _twice(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([values[:1], values[1:].repeat_interleave(2), values[-1:]])
