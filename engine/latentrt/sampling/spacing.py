"""The levels at which a run samples the schedule: the grid that a solver goes down.

Three conventions exist, and each solver keeps the one of its diffusers class:
training levels (DDPM, DDIM, PNDM, LCM, TCD), sigmas with alpha = 1 (k-diffusion's solvers) and sigmas with
alpha² + sigma² = 1 (DPM-Solver's and UniPC's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from latentrt.errors import RequestError
from latentrt.sampling.schedule import TINY_ALPHA_CUMPROD, Float64, Point, Schedule


@dataclass(frozen=True, slots=True)
class Levels:
    """The training levels, and the points of any of them and of any sigma between them.

    `log_sigmas` are float32's logarithms, held in float64, as diffusers looks timesteps up in: where timesteps are cut
    to whole numbers, their rounding decides whether the network gets 999 or 998 at the first step.
    """

    alphas_cumprod: Float64
    sigmas: Float64
    log_sigmas: Float64

    @classmethod
    def of(cls, schedule: Schedule, settings: Mapping[str, Any], *, avoid_zero: bool) -> Levels:
        """Return a schedule's levels. `avoid_zero` replaces a last ᾱ of 0 by 2⁻²⁴, for solvers that divide by alpha."""
        alphas_cumprod = schedule.alphas_cumprod(settings)
        if avoid_zero and settings.get("rescale_betas_zero_snr"):
            alphas_cumprod = np.append(alphas_cumprod[:-1], TINY_ALPHA_CUMPROD)
        with np.errstate(divide="ignore"):
            sigmas = np.sqrt((1 - alphas_cumprod) / alphas_cumprod)
            return cls(alphas_cumprod, sigmas, np.log(sigmas.astype(np.float32)).astype(np.float64))

    def at(self, timestep: float) -> Point:
        """Return the variance-preserving point of a whole training timestep."""
        index = int(timestep)
        if not 0 <= index < len(self.alphas_cumprod):
            raise RequestError(
                f"the timestep spacing reaches timestep {index}",
                needed=f"timesteps from 0 to {len(self.alphas_cumprod) - 1}",
                fix="take fewer steps, a smaller steps_offset, or another timestep_spacing",
            )
        alpha_cumprod = float(self.alphas_cumprod[index])
        return Point(float(index), math.sqrt(alpha_cumprod), math.sqrt(1 - alpha_cumprod))

    def timesteps(self, sigmas: Float64) -> Float64:
        """Return sigmas' fractional timesteps, linear in log sigma (Karras et al. 2022, k-diffusion's sigma_to_t)."""
        return np.interp(np.log(np.maximum(sigmas, 1e-10)), self.log_sigmas, np.arange(len(self.sigmas)))

    def exploding(self, sigma: float, timestep: float | None = None) -> Point:
        """Return the point with alpha = 1 of any sigma."""
        return Point(float(self.timesteps(np.array(sigma))) if timestep is None else timestep, 1.0, sigma)


@dataclass(frozen=True, slots=True)
class Grid:
    """The noise levels of one run.

    `points[i]` is where step i calls the network and `targets[i]` is where it leads: the next point, except in those
    diffusers classes that count back a fixed number of timesteps. `start` is what standard normal noise is
    multiplied by to become the first latents. `first` is how many points of the whole run were left out.
    """

    points: tuple[Point, ...]
    targets: tuple[Point, ...]
    start: float
    levels: Levels
    settings: Mapping[str, Any]
    first: int = 0

    @property
    def steps(self) -> tuple[tuple[Point, Point], ...]:
        """Pairs (here, there), one a step."""
        return tuple(zip(self.points, self.targets, strict=True))

    @property
    def count(self) -> int:
        """The number of points of the whole run."""
        return self.first + len(self.points)

    def since(self, first: int) -> Grid:
        """Return the rest of the run from a point on, for a run that begins on a given picture."""
        return replace(self, points=self.points[first:], targets=self.targets[first:], first=self.first + first)


CLEAN = Point(-1.0, 1.0, 0.0)
DISTILLED_PART = "distilled_part"  # of a grid's settings alone: how much of the distilled timesteps it may use


def training_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int) -> Grid:
    """Return DDPM's grid: whole training timesteps, each step leading to the next one, the last to clean latents."""
    levels = Levels.of(schedule, settings, avoid_zero=False)
    points = tuple(levels.at(t) for t in np.round(_timesteps(settings, steps)))
    return Grid(points, (*points[1:], CLEAN), 1.0, levels, settings)


def strided_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int) -> Grid:
    """Return DDIM's grid: each step leads `num_train_timesteps // steps` back, with any spacing, as in diffusers."""
    levels = Levels.of(schedule, settings, avoid_zero=False)
    points = tuple(levels.at(t) for t in np.round(_timesteps(settings, steps)))
    final = CLEAN if settings["set_alpha_to_one"] else levels.at(0)
    stride = settings["num_train_timesteps"] // steps
    targets = tuple(levels.at(p.timestep - stride) if p.timestep >= stride else final for p in points)
    return Grid(points, targets, 1.0, levels, settings)


def plms_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int) -> Grid:
    """Return PNDM's grid without Runge-Kutta: a point for each network call, so that the second level has two."""
    once = strided_grid(schedule, settings, steps)
    return replace(once, points=once.points[:2] + once.points[1:], targets=once.targets[:2] + once.targets[1:])


def consistency_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int) -> Grid:
    """Return LCM's and TCD's grid: a subset of the timesteps that the model was distilled on (Luo et al. 2023).

    `settings` may have a DISTILLED_PART, from 0 to 1: then it is a subset of the lower part of these.
    """
    levels = Levels.of(schedule, settings, avoid_zero=False)
    original, train = settings["original_inference_steps"], settings["num_train_timesteps"]
    count = int(original * settings.get(DISTILLED_PART, 1.0))
    if not steps <= count <= original <= train:
        part = f"{count} of " if count < original else ""
        raise RequestError(
            f"{steps} steps of {part}{original} original_inference_steps were asked of {train} training timesteps",
            needed="steps <= original_inference_steps <= num_train_timesteps",
            fix=f"take fewer steps{', a larger strength,' if part else ''} or raise original_inference_steps",
        )
    distilled = (np.arange(1, count + 1) * (train // original) - 1)[::-1]
    chosen = distilled[np.floor(np.linspace(0, count, steps, endpoint=False)).astype(int)]
    points = tuple(levels.at(t) for t in chosen)
    return Grid(points, (*points[1:], levels.at(0)), 1.0, levels, settings)


def sigma_grid(
    schedule: Schedule, settings: Mapping[str, Any], steps: int, *, whole_karras_timesteps: bool = False
) -> Grid:
    """Return the grid of k-diffusion's solvers: alpha = 1. Diffusers' DPM2 rounds the timesteps of Karras' sigmas."""
    levels = Levels.of(schedule, settings, avoid_zero=True)
    timesteps = _float32(_timesteps(settings, steps))
    last = _final_sigma(settings, levels)
    if settings.get("interpolation_type") == "log_linear":
        sigmas = np.exp(np.linspace(math.log(levels.sigmas[-1]), math.log(levels.sigmas[0]), steps + 1))
    else:
        sigmas = np.interp(timesteps, np.arange(len(levels.sigmas)), levels.sigmas)
    chosen = _respaced(settings, sigmas[0], sigmas[-1], steps)
    if chosen is not None:
        sigmas, timesteps = chosen, levels.timesteps(chosen)
        if whole_karras_timesteps and settings["use_karras_sigmas"]:
            timesteps = np.round(timesteps)
    elif len(sigmas) > steps:  # the log-linear ladder has its own last level, which stands in for the final sigma
        sigmas, last = sigmas[:-1], float(sigmas[-1])
    sigmas = _float32(np.append(sigmas, last))
    if settings.get("timestep_type") == "continuous" and settings["prediction_type"] == "v_prediction":
        timesteps = 0.25 * np.log(sigmas[:-1])
    points = [levels.exploding(s, t) for s, t in zip(sigmas.tolist(), [*timesteps.tolist(), 0.0], strict=True)]
    largest = float(max(sigmas))
    start = math.hypot(largest, 1.0) if settings["timestep_spacing"] == "leading" else largest
    return Grid(tuple(points[:-1]), tuple(points[1:]), start, levels, settings)


def lambda_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int, *, unipc: bool = False) -> Grid:
    """Return DPM-Solver's and UniPC's grid: alpha² + sigma² = 1, whole timesteps."""
    levels = Levels.of(schedule, settings, avoid_zero=True)
    last = _final_sigma(settings, levels)
    sigmas = _respaced(settings, levels.sigmas[-1], levels.sigmas[0], steps)
    if sigmas is None and settings.get("use_lu_lambdas"):  # Lu et al. 2022: even in lambda
        sigmas = np.exp(np.linspace(levels.log_sigmas[-1], levels.log_sigmas[0], steps))
    if sigmas is None:
        usable = _unclipped(levels, settings.get("lambda_min_clipped", -math.inf))
        timesteps = np.round(_timesteps(settings, steps, last=usable, open_end=True))
        sigmas = np.interp(timesteps, np.arange(len(levels.sigmas)), levels.sigmas)
    else:
        timesteps = _whole_timesteps(settings, levels, sigmas, cut_cosine=not unipc)
        last = float(sigmas[-1]) if unipc and last > 0 else last
    sigmas = _float32(np.append(sigmas, last))
    points = [_preserving(s, t) for s, t in zip(sigmas.tolist(), [*timesteps.tolist(), 0.0], strict=True)]
    return Grid(tuple(points[:-1]), tuple(points[1:]), 1.0, levels, settings)


def edm_grid(schedule: Schedule, settings: Mapping[str, Any], steps: int) -> Grid:
    """Return an EDM model's grid: alpha = 1, sigmas of its own, and ln(sigma) / 4 as timestep (Karras et al. 2022)."""
    low, high, spread = settings["sigma_min"], settings["sigma_max"], settings["sigma_data"]
    if settings["sigma_schedule"] == "karras":
        sigmas = _karras(low, high, steps, settings["rho"])
    else:
        sigmas = np.exp(np.linspace(math.log(high), math.log(low), steps))
    last = sigmas[-1] if settings["final_sigmas_type"] == "sigma_min" else 0.0
    sigmas = _float32(np.append(sigmas, last))
    timesteps = [*(0.25 * np.log(sigmas[:-1])), 0.0]
    points = [Point(float(t), 1.0, s, spread) for s, t in zip(sigmas.tolist(), timesteps, strict=True)]
    prediction = {"epsilon": "edm"}.get(settings["prediction_type"], settings["prediction_type"])
    levels = Levels(*[np.empty(0)] * 3)  # it was trained at any sigma
    own = {**settings, "prediction_type": prediction}
    return Grid(tuple(points[:-1]), tuple(points[1:]), math.hypot(high, 1.0), levels, own)


def _whole_timesteps(settings: Mapping[str, Any], levels: Levels, sigmas: Float64, *, cut_cosine: bool) -> Float64:
    """Return the network's timesteps at respaced sigmas: diffusers rounds for Karras and Lu, and cuts for the others.

    DPM-Solver's class (`cut_cosine`) also cuts wherever the betas are cosine.
    """
    timesteps = levels.timesteps(sigmas)
    rounds = settings["use_karras_sigmas"] or settings.get("use_lu_lambdas")
    if rounds and not (cut_cosine and settings["beta_schedule"] == "squaredcos_cap_v2"):
        return np.round(timesteps)
    return np.trunc(timesteps)


dpm2_grid = partial(sigma_grid, whole_karras_timesteps=True)
unipc_grid = partial(lambda_grid, unipc=True)


def _final_sigma(settings: Mapping[str, Any], levels: Levels) -> float:
    return float(levels.sigmas[0]) if settings.get("final_sigmas_type") == "sigma_min" else 0.0


def _float32(values: Float64) -> Float64:
    """Round to float32: diffusers keeps its grids so, and the grid is part of the definition of a run."""
    return values.astype(np.float32).astype(np.float64)


def _preserving(sigma: float, timestep: float) -> Point:
    alpha = 1 / math.hypot(sigma, 1.0)
    return Point(timestep, alpha, sigma * alpha)


def _timesteps(settings: Mapping[str, Any], steps: int, *, last: int | None = None, open_end: bool = False) -> Float64:
    """Return descending timesteps, not yet rounded where the spacing is "linspace" (Lin et al. 2023, table 2).

    `open_end` is DPM-Solver's: one level more than steps, the lowest being where the last step leads.
    """
    train, offset = settings["num_train_timesteps"], settings["steps_offset"]
    if steps > train:
        raise RequestError(
            f"{steps} steps were asked for", needed=f"at most {train}, the training timesteps", fix="take fewer steps"
        )
    last, count = train if last is None else last, steps + 1 if open_end else steps
    if settings["timestep_spacing"] == "linspace":
        return np.linspace(0, last - 1, count)[::-1][:steps]
    if settings["timestep_spacing"] == "leading":
        return (np.arange(count) * (last // count))[::-1][:steps] + float(offset)
    descending: Float64 = np.round(last - np.arange(steps) * (train / steps))
    return descending[descending > 0] - 1


def _unclipped(levels: Levels, lambda_min: float) -> int:
    """Return how many training timesteps have a lambda of at least `lambda_min` (Lu et al. 2022, for cosine betas)."""
    lambdas = np.log(np.sqrt(levels.alphas_cumprod)) - np.log(np.sqrt(1 - levels.alphas_cumprod))
    return len(lambdas) - int(np.searchsorted(lambdas[::-1], lambda_min))


def _respaced(settings: Mapping[str, Any], sigma_max: float, sigma_min: float, steps: int) -> Float64 | None:
    """Return Karras', exponential or beta sigmas from sigma_max to sigma_min, or None for the timesteps' own."""
    low = float(sigma_min) if settings.get("sigma_min") is None else settings["sigma_min"]
    high = float(sigma_max) if settings.get("sigma_max") is None else settings["sigma_max"]
    if settings.get("use_karras_sigmas"):
        return _karras(low, high, steps)
    if settings.get("use_exponential_sigmas"):
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    if settings.get("use_beta_sigmas"):  # Lee et al. 2024
        return low + _beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)
    return None


def _karras(low: float, high: float, steps: int, rho: float = 7.0) -> Float64:
    """Return Karras et al. 2022, equation 5."""
    ramp = np.linspace(0, 1, steps)
    return np.asarray((high ** (1 / rho) + ramp * (low ** (1 / rho) - high ** (1 / rho))) ** rho)


def _beta_quantile(probability: Float64, shape: float = 0.6) -> Float64:
    """Return quantiles of the symmetric Beta(shape, shape) distribution, by bisection of its distribution function.

    Up to one half the distribution function is a power series that gains a bit a term; above, symmetry serves.
    """
    order = np.arange(60)
    factors = np.cumprod(np.append(1.0, (order[1:] - shape) / order[1:])) / (shape + order)
    scale = math.gamma(2 * shape) / math.gamma(shape) ** 2
    lower = np.minimum(probability, 1 - probability)
    low, high = np.zeros_like(lower), np.full_like(lower, 0.5)
    for _ in range(60):
        middle = (low + high) / 2
        below = scale * middle**shape * (middle[:, None] ** order @ factors) < lower
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.where(probability <= 0.5, low, 1 - low)
