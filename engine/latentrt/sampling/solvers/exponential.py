"""Exponential integrators, in lambda = log(alpha / sigma): DPM-Solver++ and UniPC remember x0 and interpolate it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from latentrt.sampling.schedule import Point
from latentrt.sampling.solvers.base import Model, Noise, Vector
from latentrt.sampling.spacing import Grid


def dpmpp_multistep(
    x: Vector,
    grid: Grid,
    model: Model,
    noise: Noise,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    kdiffusion: bool = False,
) -> Vector:
    """Solve by Lu et al. 2022 (DPM-Solver++), algorithm 2 and appendix: 2M, 3M and their SDE forms.

    SDE steps go `eta` times their length in lambda further down, and noise comes back up (k-diffusion's eta).

    In third-order SDE steps, k-diffusion's sample_dpmpp_3m_sde subtracts a half within phi_3, as the expansion of the
    exponential wants (`kdiffusion`). diffusers 0.42 adds it; parity with diffusers is the default.
    """
    settings = grid.settings
    stochastic = settings["algorithm_type"] == "sde-dpmsolver++"
    x0s: list[Vector] = []
    for index, (here, there) in enumerate(grid.steps):
        x0s = [model.x0(x, here), *x0s[:2]]
        order = min(settings["solver_order"], len(x0s), _final_order(settings, grid.first + index, grid.count))
        h = there.lam - here.lam
        further = eta * h if stochastic and eta else 0.0  # h may be infinite
        y, decay = h + further, math.exp(-further)
        x = there.sigma / here.sigma * decay * x - there.alpha * math.expm1(-y) * x0s[0]
        if order > 1:
            hs = [grid.points[index - k].lam - grid.points[index - k - 1].lam for k in range(order - 1)]
            sign = -1.0 if stochastic and not kdiffusion else 1.0
            x = x + there.alpha * _dpmpp_correction(x0s, h, y, hs, settings["solver_type"], sign)
        if further and there.sigma > 0:
            x = x + s_noise * there.sigma * math.sqrt(-math.expm1(-2 * further)) * noise()
    return x


def _final_order(settings: Any, index: int, count: int) -> int:
    """Return the highest order that diffusers allows at this step: short runs end with low orders."""
    short = settings["lower_order_final"] and count < 15
    if index == count - 1 and (short or settings["euler_at_final"] or settings["final_sigmas_type"] == "zero"):
        return 1
    return 2 if index == count - 2 and short else 3


def _dpmpp_correction(x0s: list[Vector], h: float, y: float, hs: list[float], kind: str, sign: float) -> Vector:
    """Return the second- and third-order terms, from divided differences of past x0 (y is h, or 2h for the SDE).

    `second` is half a second derivative and a whole one is due, so that 3M's errors fall with order 2 only; diffusers
    and k-diffusion have it so.
    """
    first = (h / hs[0]) * (x0s[0] - x0s[1])
    if len(hs) == 1 and kind == "midpoint":
        return -0.5 * math.expm1(-y) * first
    phi_2 = math.expm1(-y) / y + 1
    if len(hs) == 1:
        return phi_2 * first
    r0, r1 = hs[0] / h, hs[1] / h
    second = (first - (x0s[1] - x0s[2]) / r1) / (r0 + r1)
    phi_3 = (math.expm1(-y) + y) / y**2 - sign * 0.5
    return phi_2 * (first + r0 * second) - phi_3 * second


def unipc(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Zhao et al. 2023, algorithm 5 (UniPC, data prediction): correct, then predict.

    Corrector and predictor differ only in the sum of divided differences, so to correct is to exchange that sum for one
    that knows x0 at the place predicted too.
    """
    settings, kind = grid.settings, grid.settings["solver_type"]
    x0s: list[Vector] = []
    known: list[Point] = []
    order, guessed = 0, 0  # of the step before
    for index, (here, there) in enumerate(grid.steps):
        x0 = model.x0(x, here)
        if index > 0 and grid.first + index - 1 not in settings["disable_corrector"]:
            x = x - guessed + _unipc_differences(x0s, known, here, order, kind, x0)
        x0s, known = [x0, *x0s[:2]], [here, *known[:2]]
        left = len(grid.points) - index if settings["lower_order_final"] else grid.count
        order = min(settings["solver_order"], left, index + 1)
        guessed = _unipc_differences(x0s, known, there, order, kind)
        x = there.sigma / here.sigma * x - there.alpha * math.expm1(here.lam - there.lam) * x0 + guessed
    return x


def _unipc_differences(
    x0s: list[Vector], known: list[Point], there: Point, order: int, kind: str, new: Vector = None
) -> Vector:
    """Return the sum in UniP (equation 3) from known[0] to there or, given x0 there (`new`), in UniC (equation 8)."""
    here = known[0]
    h = there.lam - here.lam
    gaps = [point.lam - here.lam for point in known[1:order]]
    slopes = [h / gap * (x0 - x0s[0]) for x0, gap in zip(x0s[1:order], gaps, strict=True)]
    if new is not None:
        gaps, slopes = [*gaps, h], [*slopes, new - x0s[0]]
    if not slopes:
        return 0
    scale, weights = _unipc_weights(gaps, h, kind)
    return -there.alpha * scale * sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))


def _unipc_weights(gaps: list[float], h: float, kind: str) -> tuple[float, list[float]]:
    """Return B(h) and the weights that cancel the error's leading terms; one slope alone always weighs a half."""
    scale = -h if kind == "bh1" else math.expm1(-h)
    if len(gaps) == 1:
        return scale, [0.5]
    targets, factorial, phi = [], 1, math.expm1(-h) / -h - 1
    for power in range(1, len(gaps) + 1):
        targets.append(phi * factorial / scale)
        factorial *= power + 1
        phi = phi / -h - 1 / factorial
    matrix = np.vander([gap / h for gap in gaps], increasing=True).T
    return scale, np.linalg.solve(matrix, targets).tolist()
