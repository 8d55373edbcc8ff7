"""k-diffusion's solvers, in sigma: x = x0 + sigma * epsilon, where epsilon is dx/dsigma."""

from __future__ import annotations

import math

import numpy as np

from latentrt.sampling.solvers.base import Model, Noise, Vector
from latentrt.sampling.spacing import Grid


def euler(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Karras et al. 2022, algorithm 2 without churn and without the correction."""
    for here, there in grid.steps:
        x = x + (there.sigma - here.sigma) * model.epsilon(x, here)  # epsilon is dx/dsigma where alpha is 1
    return x


def euler_ancestral(
    x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Vector:
    """Solve by k-diffusion's sample_euler_ancestral: an Euler step past the target, then noise up to it."""
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma, eta)
        x = x + (down - here.sigma) * model.epsilon(x, here)
        if up > 0:
            x = x + s_noise * up * noise()
    return x


def heun(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Karras et al. 2022, algorithm 1."""
    for here, there in grid.steps:
        slope, distance = model.epsilon(x, here), there.sigma - here.sigma
        guess = x + distance * slope
        if there.sigma > 0:
            guess = x + distance * (slope + model.epsilon(guess, there)) / 2
        x = guess
    return x


def dpm2(x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 0.0, s_noise: float = 1.0) -> Vector:
    """Solve by k-diffusion's sample_dpm_2, or with an eta its ancestral form: epsilon at the geometric mean of both
    sigmas.
    """
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma, eta)
        epsilon = model.epsilon(x, here)
        if down == 0:
            return x + (down - here.sigma) * epsilon
        middle = grid.levels.exploding(math.sqrt(here.sigma * down))
        guess = x + (middle.sigma - here.sigma) * epsilon
        x = x + (down - here.sigma) * model.epsilon(guess, middle)
        if up > 0:
            x = x + s_noise * up * noise()
    return x


def lms(x: Vector, grid: Grid, model: Model, noise: Noise, *, order: int = 4) -> Vector:
    """Solve by Adams-Bashforth in sigma (k-diffusion's sample_lms): the polynomial through past slopes, integrated."""
    slopes: list[Vector] = []
    for index, (here, there) in enumerate(grid.steps):
        slopes = [model.epsilon(x, here), *slopes[: order - 1]]
        known = [grid.points[index - k].sigma for k in range(len(slopes))]
        weights = _lagrange_integrals(known, here.sigma, there.sigma)
        x = x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def _lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """Return the integrals from start to end of the nodes' Lagrange basis polynomials (Gauss-Legendre, exact here)."""
    roots, weights = np.polynomial.legendre.leggauss(4)
    times = (start + end) / 2 + (end - start) / 2 * roots
    integrals = []
    for k, node in enumerate(nodes):
        others = nodes[:k] + nodes[k + 1 :]
        basis = np.prod([(times - other) / (node - other) for other in others], axis=0) if others else np.ones(4)
        integrals.append(float((end - start) / 2 * weights @ basis))
    return integrals


def dpmpp_2s_ancestral(
    x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Vector:
    """Solve by Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2, made ancestral by k-diffusion."""
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma, eta)
        x0 = model.x0(x, here)
        if down == 0:
            return x0
        middle = grid.levels.exploding(math.sqrt(here.sigma * down))
        guess = middle.sigma / here.sigma * x + (1 - middle.sigma / here.sigma) * x0
        x = down / here.sigma * x + (1 - down / here.sigma) * model.x0(guess, middle)
        if up > 0:
            x = x + s_noise * up * noise()
    return x


def _ancestral(here: float, there: float, eta: float) -> tuple[float, float]:
    """Return the noise to add, and the sigma to step down to before (k-diffusion's get_ancestral_step)."""
    up = min(there, eta * math.sqrt(max(there**2 * (here**2 - there**2) / here**2, 0.0)))
    return up, math.sqrt(there**2 - up**2)
