"""Solvers on whole training timesteps: x = alpha * x0 + sigma * epsilon with alpha² + sigma² = 1."""

from __future__ import annotations

import math

from latentrt.sampling.schedule import Point
from latentrt.sampling.solvers.base import Model, Noise, Vector
from latentrt.sampling.spacing import Grid


def ddpm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Ho et al. 2020, equation 7, with the posterior's or the forward process' variance."""
    kind = grid.settings["variance_type"]
    for here, there in grid.steps:
        x0 = model.x0(x, here)
        alpha = (here.alpha / there.alpha) ** 2  # of this step alone, the paper's α_t
        beta = 1 - alpha
        x = there.alpha * beta / here.sigma**2 * x0 + math.sqrt(alpha) * there.sigma**2 / here.sigma**2 * x
        if here.timestep > 0:
            posterior = max(there.sigma**2 / here.sigma**2 * beta, 1e-20)
            x = x + math.sqrt(beta if kind == "fixed_large" else posterior) * noise()
    return x


def ddim(x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 0.0) -> Vector:
    """Solve by Song et al. 2020, equation 12."""
    for here, there in grid.steps:
        x0, epsilon = model.x0_epsilon(x, here)
        variance = there.sigma**2 / here.sigma**2 * (1 - here.alpha**2 / there.alpha**2)
        deviation = eta * math.sqrt(max(variance, 0.0))
        x = there.alpha * x0 + math.sqrt(there.sigma**2 - deviation**2) * epsilon
        if deviation > 0:
            x = x + deviation * noise()
    return x


def pndm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Liu et al. 2022, linear multistep with one Euler-trapezoid step to begin with (`skip_prk_steps`).

    As in diffusers the network's outputs themselves are combined, and turned into epsilon afterwards; and a run that
    begins midway redoes its first step from one stride above its second call, whichever level that is.
    """
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    begin = x
    outputs: list[Vector] = []
    for index, (here, there) in enumerate(grid.steps):
        out = model.output(x, here)
        if index == 1:
            stride = grid.settings["num_train_timesteps"] // (grid.count - 1)  # one level has two points
            earlier = grid.levels.at(here.timestep + stride)
            x = _transfer(begin, (out + outputs[0]) / 2, earlier, here, grid)
            continue
        outputs = [out, *outputs[:3]]
        combined = sum(w * each for w, each in zip(weights[len(outputs) - 1], outputs, strict=True))
        x = _transfer(x, combined, here, there, grid)
    return x


def _transfer(x: Vector, output: Vector, here: Point, there: Point, grid: Grid) -> Vector:
    """Apply Liu et al. 2022, equation 9."""
    epsilon = here.alpha * output + here.sigma * x if grid.settings["prediction_type"] == "v_prediction" else output
    drop = there.alpha**2 - here.alpha**2
    divisor = here.alpha**2 * there.sigma + here.alpha * here.sigma * there.alpha
    return there.alpha / here.alpha * x - drop / divisor * epsilon


def lcm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Solve by Luo et al. 2023, algorithm 2: jump to clean latents, add noise, jump again."""
    data = 0.5
    for index, (here, there) in enumerate(grid.steps):
        scaled = here.timestep * grid.settings["timestep_scaling"]
        skip, out = data**2 / (scaled**2 + data**2), scaled / math.hypot(scaled, data)
        x = out * model.x0(x, here) + skip * x
        if index < len(grid.points) - 1:
            x = there.alpha * x + there.sigma * noise()
    return x


def tcd(x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 0.3) -> Vector:
    """Solve by Zheng et al. 2024, algorithm 4: jump below the next level, then add noise up to it (eta: their γ)."""
    for index, (here, there) in enumerate(grid.steps):
        below = grid.levels.at(math.floor((1 - eta) * there.timestep))
        x0, epsilon = model.x0_epsilon(x, here)
        x = below.alpha * x0 + below.sigma * epsilon
        if eta > 0 and index < len(grid.points) - 1:
            ratio = there.alpha / below.alpha
            x = ratio * x + math.sqrt(1 - ratio**2) * noise()
    return x
