"""`scheduler_config.json` of Stable Diffusion 1.5, this project's own model and SDXL, as they are published."""

from __future__ import annotations

from typing import Any

_SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
SD15: dict[str, Any] = {"_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0", **_SD} | {
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
EMOJI: dict[str, Any] = {"_class_name": "DDIMScheduler", "_diffusers_version": "0.42.1", **_SD} | {
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": False,
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "thresholding": False,
    "timestep_spacing": "leading",
    "trained_betas": None,
}
SDXL: dict[str, Any] = {"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.19.0.dev0", **_SD} | {
    "clip_sample": False,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
BASES = {"sd15": SD15, "emoji": EMOJI, "sdxl": SDXL}
