"""The textbook solvers, one function each that reads like its paper, and their names."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from latentrt.sampling.schedule import Schedule
from latentrt.sampling.settings import EDM_DEFAULTS
from latentrt.sampling.solvers.base import Vector
from latentrt.sampling.solvers.exponential import dpmpp_multistep, unipc
from latentrt.sampling.solvers.sigma import dpm2, dpmpp_2s_ancestral, euler, euler_ancestral, heun, lms
from latentrt.sampling.solvers.training import ddim, ddpm, lcm, pndm, tcd
from latentrt.sampling.spacing import (
    Grid,
    consistency_grid,
    dpm2_grid,
    edm_grid,
    lambda_grid,
    plms_grid,
    sigma_grid,
    strided_grid,
    training_grid,
    unipc_grid,
)


@dataclass(frozen=True, slots=True)
class Solver:
    """A solver function with the diffusers class whose settings and grid it takes.

    `settings` are those that the name itself fixes ("3m" is solver_order 3); `arguments` are its own, with defaults:
    s_noise multiplies the noise that steps add. `calls` is how often a step calls the network, except the last one,
    which needs only one call. `only_whole` says why a run cannot begin midway, for those that cannot.
    """

    function: Callable[..., Vector]
    scheduler: str
    grid: Callable[[Schedule, Mapping[str, Any], int], Grid]
    settings: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    calls: int = 1
    only_whole: str = ""


_DPM = "DPMSolverMultistepScheduler"
_NO_WARM_UP = "diffusers weighs its first slopes there as if it had those before them"
_KDPM2A = "KDPM2AncestralDiscreteScheduler"
_UNIPC = "UniPCMultistepScheduler"
_ODE = {"algorithm_type": "dpmsolver++"}
_SDE = {"algorithm_type": "sde-dpmsolver++"}
_ANCESTRAL = {"eta": 1.0, "s_noise": 1.0}  # k-diffusion's, of solvers that step too far and add noise
# k-diffusion's second step is diffusers' "heun", and its short runs keep their order.
_KDIFFUSION = {"solver_type": "heun", "lower_order_final": False}


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim, "DDIMScheduler", strided_grid, arguments={"eta": 0.0}),
    "ddpm": Solver(ddpm, "DDPMScheduler", training_grid),
    "pndm": Solver(pndm, "PNDMScheduler", plms_grid, {"skip_prk_steps": True}),
    "lcm": Solver(lcm, "LCMScheduler", consistency_grid),
    "tcd": Solver(tcd, "TCDScheduler", consistency_grid, arguments={"eta": 0.3}),
    "euler": Solver(euler, "EulerDiscreteScheduler", sigma_grid),
    "euler-ancestral": Solver(euler_ancestral, "EulerAncestralDiscreteScheduler", sigma_grid, arguments=_ANCESTRAL),
    "heun": Solver(heun, "HeunDiscreteScheduler", sigma_grid, calls=2),
    "dpm2": Solver(dpm2, "KDPM2DiscreteScheduler", dpm2_grid, calls=2),
    "dpm2-ancestral": Solver(dpm2, _KDPM2A, dpm2_grid, arguments=_ANCESTRAL, calls=2),
    "lms": Solver(lms, "LMSDiscreteScheduler", sigma_grid, arguments={"order": 4}, only_whole=_NO_WARM_UP),
    "dpmpp-2m": Solver(dpmpp_multistep, _DPM, lambda_grid, {**_ODE, "solver_order": 2}),
    "dpmpp-3m": Solver(dpmpp_multistep, _DPM, lambda_grid, {**_ODE, "solver_order": 3}),
    "dpmpp-2m-sde": Solver(dpmpp_multistep, _DPM, lambda_grid, {**_SDE, "solver_order": 2}, _ANCESTRAL),
    "dpmpp-3m-sde": Solver(dpmpp_multistep, _DPM, lambda_grid, {**_SDE, "solver_order": 3}, _ANCESTRAL),
    "dpmpp-3m-sde-kdiffusion": Solver(
        *(partial(dpmpp_multistep, kdiffusion=True), _DPM, lambda_grid),
        *({**_SDE, "solver_order": 3, **_KDIFFUSION}, _ANCESTRAL),
    ),
    "dpmpp-2s-ancestral": Solver(dpmpp_2s_ancestral, _KDPM2A, sigma_grid, arguments=_ANCESTRAL, calls=2),
    "unipc": Solver(unipc, _UNIPC, unipc_grid, {"solver_order": 2}),
    "unipc-3": Solver(unipc, _UNIPC, unipc_grid, {"solver_order": 3}),
}
EDM_SOLVERS: dict[str, Solver] = {  # of EDM models, which no other solver serves
    "edm-euler": Solver(euler, "EDMEulerScheduler", edm_grid),
    "edm-dpmpp-2m": Solver(dpmpp_multistep, "EDMDPMSolverMultistepScheduler", edm_grid, {**_ODE, "solver_order": 2}),
}
EVERY_SOLVER: Mapping[str, Solver] = ChainMap(SOLVERS, EDM_SOLVERS)


def solvers_of(schedule: Schedule) -> Mapping[str, Solver]:
    """Return the solvers that a schedule's kind of model has: one with betas, or an EDM model."""
    return EDM_SOLVERS if schedule.scheduler in EDM_DEFAULTS else SOLVERS


ALIASES = {"plms": "pndm", "euler-a": "euler-ancestral", "dpm2-a": "dpm2-ancestral", "dpmpp-2s-a": "dpmpp-2s-ancestral"}
