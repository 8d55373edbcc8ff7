"""The noise schedule a model was trained with, read from a diffusers `scheduler_config.json`.

A schedule says how much signal and noise the latents hold at each training timestep, and what the network predicts.
Where to sample it is chosen in `spacing.py`, and the steps between those levels by `solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import NotServedError, ScheduleError
from latentrt.sampling.settings import KNOWN_KEYS, SERVED, class_of, settings_of

Float64 = NDArray[np.float64]
TINY_ALPHA_CUMPROD = 2.0**-24  # diffusers' stand-in for zero where a solver divides by alpha


@dataclass(frozen=True, slots=True)
class Point:
    """A noise level: x = alpha * x0 + sigma * epsilon, and the timestep that the network gets there.

    Variance-preserving solvers have alpha² + sigma² = 1; k-diffusion's ("variance-exploding") have alpha = 1. `spread`
    is the standard deviation of x0 that the network counts with: EDM's sigma_data, 1 for all others.
    """

    timestep: float
    alpha: float
    sigma: float
    spread: float = 1.0

    @property
    def c_in(self) -> float:
        """The factor of x before the network reads it (Karras et al. 2022, table 1)."""
        return 1.0 / math.hypot(self.alpha * self.spread, self.sigma)

    @property
    def ratio(self) -> float:
        """sigma / alpha, the sigma of the point with alpha = 1; inf without signal."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def lam(self) -> float:
        """Half the log signal-to-noise ratio, log(alpha / sigma) (Lu et al. 2022); ±inf without noise or signal."""
        if self.alpha <= 0 or self.sigma <= 0:
            return math.inf if self.sigma <= 0 else -math.inf
        return math.log(self.alpha) - math.log(self.sigma)


@dataclass(frozen=True)
class Schedule:
    """A model's training schedule and the sampling settings that its config asks for.

    Make one with `Schedule.from_config(config)`. `config` keeps the settings as they were read, because each solver
    takes from them what its own diffusers class would take (see `latentrt.sampling.settings`).

    Attributes:
        config: `scheduler_config.json`.
        corrections: settings that diffusers' pipeline changes when it is made. Of a setting that the config does not
            have, only the config's own class gets the correction: diffusers' `from_config` does not pass it on.
    """

    config: Mapping[str, Any]
    corrections: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], corrections: Mapping[str, Any] | None = None) -> Schedule:
        """Read a diffusers scheduler config (the dict in `scheduler_config.json`) as it is.

        A config whose own class or settings are not served is read too: other solvers may serve it.

        Raises:
            ScheduleError: an unknown class, or a value of another kind, each by its name.
        """
        changes = dict(corrections or {})
        named = {key: changes.pop(key) for key in ("_class_name",) if key in changes}
        schedule = cls({**config, **named}, changes)
        if schedule.scheduler in SERVED:
            schedule.not_served()
        else:
            schedule.settings("DDIMScheduler")
        return schedule

    @property
    def scheduler(self) -> str:
        """The diffusers class that the config names."""
        return class_of(self.config)

    @property
    def prediction(self) -> str:
        """What the network predicts: "epsilon", "v_prediction" or "sample"."""
        return str(self.config.get("prediction_type", "epsilon"))

    def settings(self, scheduler: str, **options: Any) -> dict[str, Any]:
        """Return the settings that diffusers' `scheduler.from_config(pipeline.scheduler.config, **options)` would have.

        Raises:
            ScheduleError: an option that the class lacks, or a value of another kind.
            NotServedError: the class, or one of its settings, cannot be served.
        """
        own = scheduler == self.config.get("_class_name")
        corrected = {key: value for key, value in self.corrections.items() if own or key in self.config}
        return settings_of(scheduler, {**self.config, **corrected}, options)

    def not_served(self) -> str:
        """Return why the config's own solver is not served; empty if it is. Raise ScheduleError as `settings`."""
        try:
            self.settings(self.scheduler)
        except NotServedError as error:
            return str(error)
        return ""

    @property
    def unknown_keys(self) -> tuple[str, ...]:
        """The config's keys that no scheduler has; they are ignored, as diffusers does."""
        return tuple(key for key in self.config if not key.startswith("_") and key not in KNOWN_KEYS)

    def add_noise(self, clean: NDArray[np.float32], noise: NDArray[np.float32], timestep: int) -> NDArray[np.float32]:
        """Return sqrt(ᾱ)·clean + sqrt(1 - ᾱ)·noise: the forward process at a training timestep (Ho et al. 2020, eq. 4).

        Args:
            clean: any shape, float32, in -1..1 for pixels.
            noise: standard normal of the same shape.
            timestep: from 0, the least noise, to num_train_timesteps - 1.

        Raises:
            ScheduleError: the schedule has no such timestep.
        """
        alphas_cumprod = self.alphas_cumprod(self.settings(self.scheduler))
        if not 0 <= timestep < len(alphas_cumprod):
            raise ScheduleError(f"timestep {timestep}", needed=f"one from 0 to {len(alphas_cumprod) - 1}")
        signal = alphas_cumprod[timestep]
        return np.float32(math.sqrt(signal)) * clean + np.float32(math.sqrt(1 - signal)) * noise

    @cached_property
    def _levels(self) -> dict[tuple[Any, ...], Float64]:
        return {}

    def alphas_cumprod(self, settings: Mapping[str, Any]) -> Float64:
        """Return ᾱ at every training timestep, shape (num_train_timesteps,), under one scheduler's settings.

        The values are float32's, held in float64: training and sampling code computes them in float32, and at t = 0 the
        rounding moves 1 - ᾱ by up to 7e-5 of its size.

        Raises:
            NotServedError: the settings are of an EDM model, which has no betas.
        """
        if "beta_schedule" not in settings:
            raise NotServedError("an EDM model's schedule", needed="one with betas")
        betas = settings["trained_betas"]
        key = (
            None if betas is None else tuple(betas),
            settings["beta_schedule"],
            settings["beta_start"],
            settings["beta_end"],
            settings["num_train_timesteps"],
            settings.get("rescale_betas_zero_snr", False),
        )
        if key not in self._levels:
            self._levels[key] = _alphas_cumprod(settings)
        return self._levels[key]


def _alphas_cumprod(settings: Mapping[str, Any]) -> Float64:
    betas = _betas(settings)
    if settings.get("rescale_betas_zero_snr"):
        betas = _rescale_zero_terminal_snr(betas)
    return _cumprod(np.float32(1) - betas).astype(np.float64)


def _betas(settings: Mapping[str, Any]) -> NDArray[np.float32]:
    count = settings["num_train_timesteps"]
    start, end, kind = settings["beta_start"], settings["beta_end"], settings["beta_schedule"]
    if settings["trained_betas"] is not None:
        betas = np.asarray(settings["trained_betas"], np.float32)
    elif kind == "linear":
        betas = _linspace(start, end, count)
    elif kind == "scaled_linear":
        betas = _linspace(start**0.5, end**0.5, count) ** 2
    else:
        betas = _cosine_betas(count)
    if betas.shape != (count,) or not ((betas > 0) & (betas < 1)).all():
        raise ScheduleError(
            f"the betas have shape {betas.shape} and run from {betas.min():g} to {betas.max():g}",
            needed=f"num_train_timesteps = {count} numbers between 0 and 1",
            fix="correct trained_betas, or beta_start and beta_end",
        )
    return betas


def _linspace(start: float, end: float, count: int) -> NDArray[np.float32]:
    """Return torch.linspace in float32, to the bit: counted from both ends, each value rounded once."""
    first, last = np.float32(start), np.float32(end)
    step = float((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = float(first) + step * index, float(last) - step * (count - 1 - index)
    return np.where(index < max(count // 2, 1), rising, falling).astype(np.float32)


def _cosine_betas(count: int, max_beta: float = 0.999) -> NDArray[np.float32]:
    """Return the betas of Nichol and Dhariwal 2021, equation 17."""
    time = np.arange(count + 1) / count
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.asarray(np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta), np.float32)


def _rescale_zero_terminal_snr(betas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Apply Lin et al. 2023, algorithm 1: shift and scale √ᾱ so that the last one is 0 and the first one stays."""
    root = np.sqrt(_cumprod(np.float32(1) - betas))
    first, last = root[0], root[-1]
    root = (root - last) * (first / (first - last))
    alpha_bar = root**2
    alphas = np.concatenate([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return np.float32(1) - alphas


def _cumprod(alphas: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return torch.cumprod as on the CPU: products in float64, results in float32."""
    return np.cumprod(alphas, dtype=np.float64).astype(np.float32)
