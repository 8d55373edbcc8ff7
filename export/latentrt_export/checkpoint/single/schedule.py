"""The scheduler_config.json of a single file: its family's, changed by what marker keys say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from latentrt.bundle.tensors import Tensors
from latentrt.errors import ExportError

ZERO_SNR, EDM, EDM_LOW = "ztsnr", "edm_vpred.sigma_max", "edm_vpred.sigma_min"
NUMBERS = {"I64": "<i8", "I32": "<i4", "F64": "<f8", "F32": "<f4", "F16": "<f2"}
COSXL = {  # stabilityai/cosxl, as people set it in diffusers
    "_class_name": "EDMEulerScheduler",
    "num_train_timesteps": 1000,
    "sigma_data": 1.0,
    "sigma_max": 120.0,
    "sigma_min": 0.002,
    "sigma_schedule": "exponential",
}


def schedule_of(tensors: Tensors, base: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """Return the schedule of a file.

    Args:
        tensors: the file.
        base: the schedule of its family.
        prediction: what its UNet predicts.

    Raises:
        ExportError: it is an EDM model whose sigmas are no numbers.
    """
    if EDM in tensors.entries:
        sigmas = {"sigma_max": EDM, "sigma_min": EDM_LOW}
        found = {key: _sigma(tensors, name) for key, name in sigmas.items() if name in tensors.entries}
        return {**COSXL, **found, "prediction_type": prediction}
    schedule = {**base, "prediction_type": prediction}
    if ZERO_SNR in tensors.entries:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        if schedule["_class_name"] == "PNDMScheduler":  # which cannot begin at pure noise
            schedule["_class_name"] = "DDIMScheduler"
    return schedule


def scalar(tensors: Tensors, name: str) -> float | None:
    """Return the one number of a tensor; None where there is no such tensor, or it has another form."""
    entry = tensors.entries.get(name)
    if entry is None or entry.dtype not in NUMBERS or entry.length != np.dtype(NUMBERS[entry.dtype]).itemsize:
        return None
    return float(np.frombuffer(tensors.bytes_of(name), NUMBERS[entry.dtype])[0])


def _sigma(tensors: Tensors, name: str) -> float:
    value = scalar(tensors, name)
    if value is None or not 0 < value < 1e6:
        raise ExportError(f"{tensors.path} has {name} {value}", needed="a number above 0")
    return float(f"{value:.6g}")
