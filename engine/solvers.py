"""The textbook solvers, each one function that reads like its paper.

A solver gets the latents `x`, the grid of noise levels, a `model` and `noise()`. It calls the model through
`model.x0(x, here)`, `model.epsilon(x, here)` or `model.output(x, here)`, whichever quantity it remembers, and returns
the last latents. It may only add and scale: run on symbols by `table.py` it yields the table; run on arrays it is
the oracle that tests it. It knows nothing of prediction types, guidance or batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from engine.schedule import Point, Schedule
from engine.spacing import Grid, consistency_grid, lambda_grid, sigma_grid, strided_grid, training_grid

Vector = Any  # an array or a symbol: whatever can be added and scaled
Noise = Callable[[], Vector]


class Model(Protocol):
    """One network call, answered in the quantity that the solver wants to remember."""

    def x0(self, x: Vector, here: Point) -> Vector:
        """The predicted clean latents (clipped where the schedule clips)."""

    def epsilon(self, x: Vector, here: Point) -> Vector:
        """The predicted noise, (x - alpha * x0) / sigma."""

    def output(self, x: Vector, here: Point) -> Vector:
        """What the network itself returned."""

    def x0_epsilon(self, x: Vector, here: Point) -> tuple[Vector, Vector]:
        """x0 as above and, from the same call, epsilon before any clipping."""


def ddpm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Ho et al. 2020, equation 7, with the posterior's or the forward process' variance."""
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
    """Song et al. 2020, equation 12."""
    for here, there in grid.steps:
        x0, epsilon = model.x0_epsilon(x, here)
        variance = there.sigma**2 / here.sigma**2 * (1 - here.alpha**2 / there.alpha**2)
        deviation = eta * math.sqrt(max(variance, 0.0))
        x = there.alpha * x0 + math.sqrt(there.sigma**2 - deviation**2) * epsilon
        if deviation > 0:
            x = x + deviation * noise()
    return x


def pndm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Liu et al. 2022, linear multistep with one Euler-trapezoid step to begin with (`skip_prk_steps`).

    As in diffusers the network's outputs themselves are combined, and turned into epsilon afterwards.
    """
    stride = grid.settings["num_train_timesteps"] // len(grid.points)
    here, there = grid.steps[0]
    outputs = [model.output(x, here)]
    guess = _transfer(x, outputs[0], here, there, grid)
    if len(grid.points) == 1:
        return guess
    here = grid.points[1]
    earlier = grid.levels.at(here.timestep + stride)
    x = _transfer(x, (model.output(guess, here) + outputs[0]) / 2, earlier, here, grid)
    weights = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))
    for here, there in grid.steps[1:]:
        outputs = [model.output(x, here), *outputs[:3]]
        combined = sum(w * out for w, out in zip(weights[len(outputs) - 1], outputs, strict=True))
        x = _transfer(x, combined, here, there, grid)
    return x


def _transfer(x: Vector, output: Vector, here: Point, there: Point, grid: Grid) -> Vector:
    """Liu et al. 2022, equation 9."""
    epsilon = here.alpha * output + here.sigma * x if grid.settings["prediction_type"] == "v_prediction" else output
    drop = there.alpha**2 - here.alpha**2
    divisor = here.alpha**2 * there.sigma + here.alpha * here.sigma * there.alpha
    return there.alpha / here.alpha * x - drop / divisor * epsilon


def lcm(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Luo et al. 2023, algorithm 2: jump to clean latents, add noise, jump again."""
    data = 0.5
    for index, (here, there) in enumerate(grid.steps):
        scaled = here.timestep * grid.settings["timestep_scaling"]
        skip, out = data**2 / (scaled**2 + data**2), scaled / math.hypot(scaled, data)
        x = out * model.x0(x, here) + skip * x
        if index < len(grid.points) - 1:
            x = there.alpha * x + there.sigma * noise()
    return x


def tcd(x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 0.3) -> Vector:
    """Zheng et al. 2024, algorithm 4: jump below the next level, then add noise up to it (eta is the paper's γ)."""
    for index, (here, there) in enumerate(grid.steps):
        below = grid.levels.at(math.floor((1 - eta) * there.timestep))
        x0, epsilon = model.x0_epsilon(x, here)
        x = below.alpha * x0 + below.sigma * epsilon
        if eta > 0 and index < len(grid.points) - 1:
            ratio = there.alpha / below.alpha
            x = ratio * x + math.sqrt(1 - ratio**2) * noise()
    return x


def euler(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Karras et al. 2022, algorithm 2 without churn and without the correction."""
    for here, there in grid.steps:
        x = x + (there.sigma - here.sigma) * model.epsilon(x, here)  # epsilon is dx/dsigma where alpha is 1
    return x


def euler_ancestral(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """k-diffusion's sample_euler_ancestral: an Euler step past the target, then noise up to it."""
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma)
        x = x + (down - here.sigma) * model.epsilon(x, here)
        if up > 0:
            x = x + up * noise()
    return x


def heun(x: Vector, grid: Grid, model: Model, noise: Noise) -> Vector:
    """Karras et al. 2022, algorithm 1."""
    for here, there in grid.steps:
        slope, distance = model.epsilon(x, here), there.sigma - here.sigma
        guess = x + distance * slope
        if there.sigma > 0:
            guess = x + distance * (slope + model.epsilon(guess, there)) / 2
        x = guess
    return x


def dpm2(x: Vector, grid: Grid, model: Model, noise: Noise, *, ancestral: bool = False) -> Vector:
    """k-diffusion's sample_dpm_2 and its ancestral form: epsilon is taken at the geometric mean of both sigmas."""
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma) if ancestral else (0.0, there.sigma)
        epsilon = model.epsilon(x, here)
        if down == 0:
            return x + (down - here.sigma) * epsilon
        middle = grid.levels.exploding(math.sqrt(here.sigma * down))
        guess = x + (middle.sigma - here.sigma) * epsilon
        x = x + (down - here.sigma) * model.epsilon(guess, middle)
        if up > 0:
            x = x + up * noise()
    return x


def lms(x: Vector, grid: Grid, model: Model, noise: Noise, *, order: int = 4) -> Vector:
    """Adams-Bashforth in sigma (k-diffusion's sample_lms): the polynomial through past slopes, integrated exactly."""
    slopes: list[Vector] = []
    for index, (here, there) in enumerate(grid.steps):
        slopes = [model.epsilon(x, here), *slopes[: order - 1]]
        known = [grid.points[index - k].sigma for k in range(len(slopes))]
        weights = _lagrange_integrals(known, here.sigma, there.sigma)
        x = x + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return x


def _lagrange_integrals(nodes: list[float], start: float, end: float) -> list[float]:
    """The integral from start to end of each Lagrange basis polynomial over the nodes (Gauss-Legendre, exact here)."""
    roots, weights = np.polynomial.legendre.leggauss(4)
    times = (start + end) / 2 + (end - start) / 2 * roots
    integrals = []
    for k, node in enumerate(nodes):
        others = nodes[:k] + nodes[k + 1 :]
        basis = np.prod([(times - other) / (node - other) for other in others], axis=0) if others else np.ones(4)
        integrals.append(float((end - start) / 2 * weights @ basis))
    return integrals


def dpmpp_2s_ancestral(x: Vector, grid: Grid, model: Model, noise: Noise, *, eta: float = 1.0) -> Vector:
    """Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2, made ancestral by k-diffusion."""
    for here, there in grid.steps:
        up, down = _ancestral(here.sigma, there.sigma, eta)
        x0 = model.x0(x, here)
        if down == 0:
            return x0
        middle = grid.levels.exploding(math.sqrt(here.sigma * down))
        guess = middle.sigma / here.sigma * x + (1 - middle.sigma / here.sigma) * x0
        x = down / here.sigma * x + (1 - down / here.sigma) * model.x0(guess, middle)
        if up > 0:
            x = x + up * noise()
    return x


def _ancestral(here: float, there: float, eta: float = 1.0) -> tuple[float, float]:
    """How much noise to add, and the sigma to step down to before (k-diffusion's get_ancestral_step)."""
    up = min(there, eta * math.sqrt(max(there**2 * (here**2 - there**2) / here**2, 0.0)))
    return up, math.sqrt(there**2 - up**2)


def dpmpp_multistep(x: Vector, grid: Grid, model: Model, noise: Noise, *, kdiffusion: bool = False) -> Vector:
    """Lu et al. 2022 (DPM-Solver++), algorithm 2 and appendix: 2M, 3M and their SDE forms.

    In third-order SDE steps, k-diffusion's sample_dpmpp_3m_sde subtracts a half within phi_3, as the expansion of the
    exponential wants (`kdiffusion`). diffusers 0.42 adds it; parity with diffusers is the default.
    """
    settings, count = grid.settings, len(grid.points)
    stochastic = settings["algorithm_type"] == "sde-dpmsolver++"
    x0s: list[Vector] = []
    for index, (here, there) in enumerate(grid.steps):
        x0s = [model.x0(x, here), *x0s[:2]]
        order = min(settings["solver_order"], len(x0s), _final_order(settings, index, count))
        h = there.lam - here.lam
        y = 2 * h if stochastic else h
        decay = math.exp(-h) if stochastic else 1.0
        x = there.sigma / here.sigma * decay * x - there.alpha * math.expm1(-y) * x0s[0]
        if order > 1:
            hs = [grid.points[index - k].lam - grid.points[index - k - 1].lam for k in range(order - 1)]
            sign = -1.0 if stochastic and not kdiffusion else 1.0
            x = x + there.alpha * _dpmpp_correction(x0s, h, y, hs, settings["solver_type"], sign)
        if stochastic and there.sigma > 0:
            x = x + there.sigma * math.sqrt(-math.expm1(-2 * h)) * noise()
    return x


def _final_order(settings: Any, index: int, count: int) -> int:
    """The highest order that diffusers allows at this step: short runs end with low orders."""
    short = settings["lower_order_final"] and count < 15
    if index == count - 1 and (short or settings["euler_at_final"] or settings["final_sigmas_type"] == "zero"):
        return 1
    return 2 if index == count - 2 and short else 3


def _dpmpp_correction(x0s: list[Vector], h: float, y: float, hs: list[float], kind: str, sign: float) -> Vector:
    """The second- and third-order terms, from divided differences of past x0 (y is h, or 2h for the SDE)."""
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
    """Zhao et al. 2023, algorithm 5 (UniPC, data prediction): correct, then predict.

    Corrector and predictor differ only in the sum of divided differences, so to correct is to exchange that sum for one
    that knows x0 at the place predicted too.
    """
    settings, count, kind = grid.settings, len(grid.points), grid.settings["solver_type"]
    x0s: list[Vector] = []
    known: list[Point] = []
    order, guessed = 0, 0  # of the step before
    for index, (here, there) in enumerate(grid.steps):
        x0 = model.x0(x, here)
        if index > 0 and index - 1 not in settings["disable_corrector"]:
            x = x - guessed + _unipc_differences(x0s, known, here, order, kind, x0)
        x0s, known = [x0, *x0s[:2]], [here, *known[:2]]
        left = count - index if settings["lower_order_final"] else count
        order = min(settings["solver_order"], left, index + 1)
        guessed = _unipc_differences(x0s, known, there, order, kind)
        x = there.sigma / here.sigma * x - there.alpha * math.expm1(here.lam - there.lam) * x0 + guessed
    return x


def _unipc_differences(
    x0s: list[Vector], known: list[Point], there: Point, order: int, kind: str, new: Vector = None
) -> Vector:
    """The sum in UniP (equation 3) from known[0] to there or, given x0 there (`new`), in UniC (equation 8)."""
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
    """B(h) and the weights that cancel the error's leading terms; one slope alone always weighs a half."""
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


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver function with the diffusers class whose settings and grid it takes.

    `settings` are what the name itself fixes ("3m" is solver_order 3); `arguments` are its own knobs with defaults.
    """

    function: Callable[..., Vector]
    scheduler: str
    grid: Callable[[Schedule, Mapping[str, Any], int], Grid]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)


def _dpmpp(order: int, algorithm: str, **fixed: Any) -> Solver:
    settings = {"algorithm_type": algorithm, "solver_order": order, **fixed}
    return Solver(dpmpp_multistep, "DPMSolverMultistepScheduler", lambda_grid, settings)


_KDIFFUSION = {"solver_type": "heun", "lower_order_final": False}
_KDPM2A = "KDPM2AncestralDiscreteScheduler"
_dpm2_grid = partial(sigma_grid, whole_karras_timesteps=True)
_unipc_grid = partial(lambda_grid, unipc=True)

SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "DDIMScheduler", strided_grid, arguments={"eta": 0.0}),
    "ddpm": Solver(ddpm, "DDPMScheduler", training_grid),
    "pndm": Solver(pndm, "PNDMScheduler", strided_grid, {"skip_prk_steps": True}),
    "lcm": Solver(lcm, "LCMScheduler", consistency_grid),
    "tcd": Solver(tcd, "TCDScheduler", consistency_grid, arguments={"eta": 0.3}),
    "euler": Solver(euler, "EulerDiscreteScheduler", sigma_grid),
    "euler-ancestral": Solver(euler_ancestral, "EulerAncestralDiscreteScheduler", sigma_grid),
    "heun": Solver(heun, "HeunDiscreteScheduler", sigma_grid),
    "dpm2": Solver(dpm2, "KDPM2DiscreteScheduler", _dpm2_grid),
    "dpm2-ancestral": Solver(partial(dpm2, ancestral=True), _KDPM2A, _dpm2_grid),
    "lms": Solver(lms, "LMSDiscreteScheduler", sigma_grid, arguments={"order": 4}),
    "dpmpp-2m": _dpmpp(2, "dpmsolver++"),
    "dpmpp-3m": _dpmpp(3, "dpmsolver++"),
    "dpmpp-2m-sde": _dpmpp(2, "sde-dpmsolver++"),
    "dpmpp-3m-sde": _dpmpp(3, "sde-dpmsolver++"),
    "dpmpp-3m-sde-kdiffusion": replace(
        _dpmpp(3, "sde-dpmsolver++", **_KDIFFUSION), function=partial(dpmpp_multistep, kdiffusion=True)
    ),
    "dpmpp-2s-ancestral": Solver(dpmpp_2s_ancestral, _KDPM2A, sigma_grid, arguments={"eta": 1.0}),
    "unipc": Solver(unipc, "UniPCMultistepScheduler", _unipc_grid, {"solver_order": 2}),
    "unipc-3": Solver(unipc, "UniPCMultistepScheduler", _unipc_grid, {"solver_order": 3}),
}
ALIASES = {"plms": "pndm", "euler-a": "euler-ancestral", "dpm2-a": "dpm2-ancestral", "dpmpp-2s-a": "dpmpp-2s-ancestral"}
