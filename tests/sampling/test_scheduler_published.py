"""Sums that diffusers' own tests publish for its schedulers, from tables, through the public API.

Source: huggingface/diffusers, tests/schedulers/test_scheduler_*.py ("full loop"), their configs, model and tolerances.
Not here: those of PNDM (with its Runge-Kutta warm-up), of Heun and DPM2 (their loops scale the latents themselves, from
which a table derives an earlier x), of dynamic thresholding, and of runs that begin amid a multistep solver's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import Table, advance, tabulate

Float32 = NDArray[np.float32]
LINEAR = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
CONFIGS: dict[str, dict[str, Any]] = {
    "ddim": {"_class_name": "DDIMScheduler", **LINEAR, "clip_sample": True},
    "ddpm": {"_class_name": "DDPMScheduler", **LINEAR, "variance_type": "fixed_small", "clip_sample": True},
    "euler": {"_class_name": "EulerDiscreteScheduler", **LINEAR, "num_train_timesteps": 1100},
    "euler-ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", **LINEAR, "num_train_timesteps": 1100},
    "lms": {"_class_name": "LMSDiscreteScheduler", **LINEAR, "num_train_timesteps": 1100},
    "dpmpp-2m": {"_class_name": "DPMSolverMultistepScheduler", **LINEAR}
    | {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    "unipc": {"_class_name": "UniPCMultistepScheduler", **LINEAR, "final_sigmas_type": "sigma_min"},
    "lcm": {"_class_name": "LCMScheduler"},
    "tcd": {"_class_name": "TCDScheduler"},
}
V = {"prediction_type": "v_prediction"}
KARRAS = {"use_karras_sigmas": True}
# (solver, steps, settings in the config, options, sum of |latents| or None, mean of |latents|)
PUBLISHED: list[tuple[str, int, dict[str, Any], dict[str, Any], float | None, float]] = [
    ("ddim", 10, {}, {}, 172.0067, 0.223967),
    ("ddim", 10, V, {}, 52.5302, 0.0684),
    ("ddim", 10, {"set_alpha_to_one": True, "beta_start": 0.01}, {}, 149.8295, 0.1951),
    ("ddim", 10, {"set_alpha_to_one": False, "beta_start": 0.01}, {}, 149.0784, 0.1941),
    ("ddpm", 1000, {}, {}, 258.9606, 0.3372),
    ("ddpm", 1000, V, {}, 202.0296, 0.2631),
    ("euler", 10, {}, {}, 10.0807, 0.0131),
    ("euler", 10, V, {}, 0.0002, 2.2676e-06),
    ("euler", 10, {}, KARRAS, 124.52299499511719, 0.16213932633399963),
    ("euler-ancestral", 10, {}, {}, 152.3192, 0.1983),
    ("euler-ancestral", 10, V, {}, 108.4439, 0.1412),
    ("lms", 10, {}, {}, 1006.388, 1.31),
    ("lms", 10, V, {}, 0.0017, 2.2676e-06),
    ("lms", 10, {}, KARRAS, 3812.9927, 4.9648),
    ("dpmpp-2m", 10, {}, {}, None, 0.3301),
    ("dpmpp-2m", 10, V, {}, None, 0.2251),
    ("dpmpp-2m", 10, V, KARRAS, None, 0.2096),
    ("dpmpp-2m", 10, V, {"use_lu_lambdas": True}, None, 0.1554),
    ("unipc", 10, {}, {}, None, 0.2464),
    ("unipc", 10, {}, KARRAS, None, 0.2925),
    ("unipc", 10, V, {}, None, 0.1014),
    ("unipc", 10, V, KARRAS, None, 0.1966),
    ("lcm", 1, {}, {}, 18.7097, 0.0244),
    ("lcm", 10, {}, {}, 197.7616, 0.2575),
    ("tcd", 1, {}, {"eta": 0.0}, 29.8715, 0.0389),
    ("tcd", 10, {}, {"eta": 0.0}, 181.2040, 0.2359),
]
# Runs that begin `last` steps from the end, with noise added to a picture; the sums are diffusers' too.
# DDPM's tolerance was 0.01: at timestep 1 its variance is 1 minus a number next to 1, in float32 wrong by 1e-4.
PUBLISHED_WITH_NOISE = [("ddim", 10, 2, 354.5418, 0.01), ("ddpm", 1000, 2, 387.9466, 0.03)]


def picture() -> Float32:
    """Return diffusers' `dummy_sample_deter`: 0 to 1, shape (4, 3, 8, 8); flipped it is their `dummy_noise_deter`."""
    ramp = torch.arange(768).reshape(3, 8, 8, 4) / 768
    return np.asarray(ramp.permute(3, 0, 1, 2).numpy(), np.float32)


def loop(table: Table, x: Float32, first: int = 0) -> Float32:
    """Run diffusers' loop with its `dummy_model`; like it, it continues with the latents as the network saw them."""
    generator = torch.Generator().manual_seed(0)
    memory = np.zeros((4, *x.shape), np.float32)
    for row in table.rows[first:]:
        x = np.float32(row.c_in) * x
        out = x * np.float32(row.timestep / (row.timestep + 1))
        x = advance(row, x, out, memory, torch.randn(x.shape, generator=generator).numpy() if row.c else None)
    return x


@pytest.mark.parametrize(("solver", "steps", "config", "options", "total", "mean"), PUBLISHED)
def test_full_loop(
    solver: str,
    steps: int,
    config: dict[str, Any],
    options: dict[str, Any],
    total: float | None,
    mean: float,
) -> None:
    table = tabulate(solver, Schedule.from_config({**CONFIGS[solver], **config}), steps, **options)
    magnitude = np.abs(loop(table, picture() * np.float32(table.start)))
    assert magnitude.mean() == pytest.approx(mean, abs=1e-3)
    assert total is None or magnitude.sum() == pytest.approx(total, abs=0.02 if total > 1000 else 0.01)


@pytest.mark.parametrize(("solver", "steps", "last", "total", "tolerance"), PUBLISHED_WITH_NOISE)
def test_full_loop_with_noise(solver: str, steps: int, last: int, total: float, tolerance: float) -> None:
    schedule = Schedule.from_config(CONFIGS[solver])
    table = tabulate(solver, schedule, steps)
    settings = schedule.settings(schedule.scheduler)
    signal = schedule.alphas_cumprod(settings)[int(table.timesteps[steps - last])]
    ramp = torch.arange(768).flip(-1).reshape(3, 8, 8, 4) / 768
    noise = ramp.permute(3, 0, 1, 2).numpy()
    x = np.float32(np.sqrt(signal)) * picture() + np.float32(np.sqrt(1 - signal)) * noise
    assert np.abs(loop(table, x, steps - last)).sum() == pytest.approx(total, abs=tolerance)
