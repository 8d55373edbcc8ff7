"""A1111's samplers and schedulers, and what they are called here.

Source: AUTOMATIC1111/stable-diffusion-webui, modules/sd_samplers_kdiffusion.py, sd_samplers_timesteps.py and
sd_schedulers.py, 1.10; its names from before 1.9 end in "Karras" or "Exponential".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from latentrt.sampling.solvers import EVERY_SOLVER
from latentrt.serve.http.catalog import Catalog, unknown
from latentrt.serve.http.sdapi.options import Options
from latentrt.serve.http.sdapi.schema import TextToImage


class Sampler(NamedTuple):
    """Our solver, the spacing that A1111's "Automatic" means for it, and its other names there."""

    solver: str
    spacing: str = ""
    aliases: tuple[str, ...] = ()


SAMPLERS = {
    "DPM++ 2M": Sampler("dpmpp-2m", "Karras", ("k_dpmpp_2m",)),
    "DPM++ 2M SDE": Sampler("dpmpp-2m-sde", "Karras", ("k_dpmpp_2m_sde",)),
    "DPM++ 3M SDE": Sampler("dpmpp-3m-sde-kdiffusion", "Karras", ("k_dpmpp_3m_sde",)),
    "DPM++ 2S a": Sampler("dpmpp-2s-ancestral", "Karras", ("k_dpmpp_2s_a",)),
    "Euler a": Sampler("euler-ancestral", "", ("k_euler_a", "k_euler_ancestral")),
    "Euler": Sampler("euler", "", ("k_euler",)),
    "LMS": Sampler("lms", "", ("k_lms",)),
    "Heun": Sampler("heun", "", ("k_heun",)),
    "DPM2": Sampler("dpm2", "Karras", ("k_dpm_2",)),
    "DPM2 a": Sampler("dpm2-ancestral", "Karras", ("k_dpm_2_a",)),
    "DDIM": Sampler("ddim", "", ("ddim",)),
    "PLMS": Sampler("pndm", "", ("plms",)),
    "UniPC": Sampler("unipc", "", ("unipc",)),
    "LCM": Sampler("lcm", "", ("k_lcm",)),
}
SPACINGS: dict[str, dict[str, Any]] = {
    "Automatic": {},
    "Uniform": {},
    "Karras": {"use_karras_sigmas": True},
    "Exponential": {"use_exponential_sigmas": True},
    "Beta": {"use_beta_sigmas": True},
}
_SUFFIXES = ("Karras", "Exponential")


def offered(catalog: Catalog) -> dict[str, Sampler]:
    """Return the model's samplers by name: A1111's, then ours that it has none for."""
    solvers = dict.fromkeys(catalog.solvers.values())
    known = {name: one for name, one in SAMPLERS.items() if one.solver in solvers}
    taken = {one.solver for one in known.values()}
    return known | {name: Sampler(name) for name in solvers if name not in taken}


def solver_of(catalog: Catalog, wanted: TextToImage, options: Options) -> tuple[str | None, dict[str, Any]]:
    """Return our solver, None for the usual one, and its settings, as a request names sampler and scheduler there.

    `eta` and `s_noise` act where the solver has them; elsewhere they have no effect there either.

    Raises:
        Problem: there is no such sampler or scheduler.
    """
    name = wanted.sampler_name or wanted.sampler_index or None
    spacing = _spacing(wanted.scheduler or "Automatic")
    usual = ""
    if name is not None:
        name, suffix = _without_suffix(name)
        spacing = suffix or spacing
        name, usual = _found(catalog, name)
    settings = dict(SPACINGS[usual if spacing == "Automatic" and usual else spacing])
    solver = catalog.solver(name) or catalog.own_solver
    arguments = _arguments(solver)
    eta = options.eta_ddim if solver == "ddim" else options.eta_ancestral
    given = {"eta": eta if wanted.eta is None else wanted.eta}
    given["s_noise"] = options.s_noise if wanted.s_noise is None else wanted.s_noise
    return name, settings | {
        key: value for key, value in given.items() if key in arguments and value not in (None, arguments[key])
    }


def _spacing(name: str) -> str:
    known = {spacing.lower(): spacing for spacing in SPACINGS}
    if name.lower() not in known:
        raise unknown("scheduler", name, SPACINGS)
    return known[name.lower()]


def _without_suffix(name: str) -> tuple[str, str]:
    """Return a sampler's name as it has been since A1111 1.9, and the spacing that it ended in."""
    for suffix in _SUFFIXES:
        if name.lower().endswith(f" {suffix.lower()}"):
            return name[: -len(suffix) - 1], suffix
    return name, ""


def _found(catalog: Catalog, name: str) -> tuple[str, str]:
    """Return our solver of a sampler's name, and its usual spacing. Raise Problem."""
    for known, one in offered(catalog).items():
        if name.lower() in (known.lower(), *one.aliases):
            return one.solver, one.spacing
    if name not in catalog.solvers:
        raise unknown("sampler_name", name, offered(catalog))
    return name, ""


def _arguments(solver: str) -> Mapping[str, Any]:
    """Return a solver's own arguments with their defaults; of the class that a bundle names where it fits no solver."""
    if solver in EVERY_SOLVER:
        return EVERY_SOLVER[solver].arguments
    return next((one.arguments for one in EVERY_SOLVER.values() if one.scheduler == solver), {})
