"""The settings that each diffusers scheduler class reads from `scheduler_config.json`, with their defaults.

Pure data and its checks. A key that the class lacks is ignored, as diffusers' `from_config` does. A value of another
kind is refused by name (ScheduleError), and so is one that a table of rows cannot express (NotServedError).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from latentrt.errors import NotServedError, ScheduleError
from latentrt.values import did_you_mean

_TRAINING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_STABLE_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_THRESHOLDING = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_RESPACINGS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
# The bounds are Euler's and UniPC's own, but diffusers' other classes (not LMS) obey them in a config that has them.
_SIGMAS = {**_RESPACINGS, "sigma_min": None, "sigma_max": None}
_FLOW = {"use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential"}
_LEADING = {**_TRAINING, "timestep_spacing": "leading"}
_LINSPACE = {**_TRAINING, "timestep_spacing": "linspace"}
_CONSISTENCY = {
    **_LEADING,
    **_STABLE_BETAS,
    "beta_schedule": "scaled_linear",
    "original_inference_steps": 50,
    "set_alpha_to_one": True,
    "timestep_scaling": 10.0,
    "rescale_betas_zero_snr": False,
}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **_LEADING,
        **_THRESHOLDING,
        "variance_type": "fixed_small",
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "rescale_betas_zero_snr": False,
    },
    "DDIMScheduler": {
        **_LEADING,
        **_THRESHOLDING,
        "clip_sample": True,
        "clip_sample_range": 1.0,
        "set_alpha_to_one": True,
        "rescale_betas_zero_snr": False,
    },
    "PNDMScheduler": {**_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "EulerDiscreteScheduler": {
        **_LINSPACE,
        **_SIGMAS,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "rescale_betas_zero_snr": False,
        "final_sigmas_type": "zero",
    },
    "EulerAncestralDiscreteScheduler": {**_LINSPACE, "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": {
        **_LINSPACE,
        **_STABLE_BETAS,
        **_SIGMAS,
        "clip_sample": False,
        "clip_sample_range": 1.0,
    },
    "KDPM2DiscreteScheduler": {**_LINSPACE, **_STABLE_BETAS, **_SIGMAS},
    "KDPM2AncestralDiscreteScheduler": {**_LINSPACE, **_STABLE_BETAS, **_SIGMAS},
    "LMSDiscreteScheduler": {**_LINSPACE, **_RESPACINGS},
    "DPMSolverMultistepScheduler": {
        **_LINSPACE,
        **_THRESHOLDING,
        **_SIGMAS,
        **_FLOW,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "rescale_betas_zero_snr": False,
    },
    "UniPCMultistepScheduler": {
        **_LINSPACE,
        **_THRESHOLDING,
        **_SIGMAS,
        **_FLOW,
        "solver_order": 2,
        "predict_x0": True,
        "solver_type": "bh2",
        "lower_order_final": True,
        "disable_corrector": [],
        "solver_p": None,
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
        "shift_terminal": None,
    },
    "LCMScheduler": {**_CONSISTENCY, **_THRESHOLDING, "clip_sample": False, "clip_sample_range": 1.0},
    "TCDScheduler": _CONSISTENCY,  # it has the keys to clip and to threshold too, and does neither
}

_EDM = {
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
    "sigma_schedule": "karras",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rho": 7.0,
    "final_sigmas_type": "zero",
}
EDM_DEFAULTS: dict[str, dict[str, Any]] = {  # of models with sigmas in place of betas (Karras et al. 2022)
    "EDMEulerScheduler": _EDM,
    "EDMDPMSolverMultistepScheduler": {
        **_EDM,
        **_THRESHOLDING,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
    },
}
SERVED = {**DEFAULTS, **EDM_DEFAULTS}
# diffusers' other classes for models with betas. Their configs serve the solvers of the classes above.
OTHER_CLASSES = (
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "DEISMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
)

_LISTS = ("trained_betas", "disable_corrector")
MAX_TIMESTEPS = 1_000_000  # far beyond any model; keeps a damaged config from using all memory

KNOWN_KEYS = frozenset(key for defaults in SERVED.values() for key in defaults)

_FIXED_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large")
_NOISE_OR_V = {"prediction_type": ("epsilon", "v_prediction")}
_CHOICES: dict[str, tuple[Any, ...]] = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "timestep_type": ("discrete", "continuous"),
    "interpolation_type": ("linear", "log_linear"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
    "sigma_schedule": ("karras", "exponential"),
    "solver_order": (1, 2, 3),
}
_PER_CLASS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {"variance_type": _FIXED_VARIANCES},
    "PNDMScheduler": _NOISE_OR_V,
    "EulerAncestralDiscreteScheduler": _NOISE_OR_V,
    "KDPM2DiscreteScheduler": _NOISE_OR_V,
    "KDPM2AncestralDiscreteScheduler": _NOISE_OR_V,
    "DPMSolverMultistepScheduler": {"variance_type": (None, *_FIXED_VARIANCES), "solver_type": ("midpoint", "heun")},
    "UniPCMultistepScheduler": {"solver_type": ("bh1", "bh2")},
    "EDMEulerScheduler": _NOISE_OR_V,
    "EDMDPMSolverMultistepScheduler": {"solver_type": ("midpoint", "heun")},
}
# Values that diffusers has and no solver of a class here.
_UNSERVED = {
    "algorithm_type": ("dpmsolver", "sde-dpmsolver"),
    "prediction_type": ("sample",),
    "solver_type": ("logrho",),
}
# What a value means to diffusers in each class's own terms when it comes from another class's config.
_TRANSLATED: dict[str, dict[str, dict[Any, Any]]] = {
    "DPMSolverMultistepScheduler": {"solver_type": {"bh1": "midpoint", "bh2": "midpoint", "logrho": "midpoint"}},
    "UniPCMultistepScheduler": {"solver_type": {"midpoint": "bh2", "heun": "bh2", "logrho": "bh2"}},
}
_REFUSED: dict[str, tuple[Any, str]] = {
    "thresholding": (False, "dynamic thresholding takes a quantile of each picture, which no row can hold"),
    "skip_prk_steps": (True, "the Runge-Kutta warm-up needs six memory slots, a table has four"),
    "use_flow_sigmas": (False, "flow matching is another family of models"),
    "use_dynamic_shifting": (False, "flow matching is another family of models"),
    "shift_terminal": (None, "flow matching is another family of models"),
    "solver_p": (None, "another scheduler as predictor is state that a table cannot hold"),
    "predict_x0": (True, "latentrt's UniPC predicts x0, as all published settings do"),
}
_NAME_A_SOLVER = "name a solver: solver=, --solver, latentrt serve --scheduler; latentrt solvers lists them"


def class_of(config: Mapping[str, Any]) -> str:
    """Return the diffusers class that a config names: one of SERVED, or of OTHER_CLASSES.

    Raises:
        ScheduleError: the class is missing or another one.
    """
    name = config.get("_class_name")
    if not isinstance(name, str) or name not in (*SERVED, *OTHER_CLASSES):
        raise ScheduleError(
            f"the scheduler class is {name!r}",
            needed=f"_class_name: one of {', '.join(SERVED)}",
            fix=did_you_mean(name, SERVED, "choose one of these; flow-matching models are not served"),
        )
    return str(name)


def settings_of(scheduler: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a class's defaults, overlaid with a config (of any class) and then with explicit options.

    Raises:
        ScheduleError: an option that this class lacks, or a value of another kind.
        NotServedError: the class, or a value of one of its settings, cannot be served.
    """
    if scheduler not in SERVED:
        raise NotServedError(
            f"the checkpoint's own {scheduler} is not served",
            needed="another solver",
            fix=_NAME_A_SOLVER,
        )
    own = config.get("_class_name", scheduler)
    if (own in EDM_DEFAULTS) != (scheduler in EDM_DEFAULTS):
        raise NotServedError(
            f"{scheduler} on the schedule of {own}",
            needed=f"{'a solver of ' + ', '.join(EDM_DEFAULTS) if own in EDM_DEFAULTS else 'an EDM model'}",
            fix="leave the solver out, for the model's own",
        )
    defaults = SERVED[scheduler]
    for key in options:
        if key not in defaults:
            raise ScheduleError(
                f"{key!r} is not an option of {scheduler}",
                needed=f"one of {', '.join(sorted(defaults))}",
                fix=did_you_mean(key, defaults, "leave the option out"),
            )
    read = {key: value for key, value in config.items() if key in defaults}
    for key, meanings in _TRANSLATED.get(scheduler, {}).items():
        if isinstance(read.get(key), str):
            read[key] = meanings.get(read[key], read[key])
    settings = {**defaults, **read, **options}
    for key, default in defaults.items():
        if (
            isinstance(default, bool) and settings[key] is None
        ):  # JSON's null, which diffusers only ever tests for truth
            settings[key] = False
    _check(scheduler, settings)
    return settings


def _check(scheduler: str, settings: Mapping[str, Any]) -> None:
    choices = {**_CHOICES, **_PER_CLASS.get(scheduler, {})}
    for key, allowed in choices.items():
        if key in settings and settings[key] not in (*allowed, *_UNSERVED.get(key, ())):
            raise _not_among(ScheduleError, scheduler, key, settings[key], allowed)
    for key, default in SERVED[scheduler].items():
        if key not in choices:
            _check_kind(scheduler, key, default, settings[key])
    chosen = [key for key in _RESPACINGS if settings.get(key)]
    if len(chosen) > 1:
        raise ScheduleError(
            f"{' and '.join(chosen)} are both set", needed="one choice of sigmas", fix="keep one of them"
        )
    _check_ranges(settings)
    _check_served(scheduler, settings)


def _check_served(scheduler: str, settings: Mapping[str, Any]) -> None:
    """Refuse what diffusers can do and a table cannot. It comes last: settings with nothing else wrong may be kept."""
    for key, allowed in {**_CHOICES, **_PER_CLASS.get(scheduler, {})}.items():
        if key in settings and settings[key] not in allowed:
            raise _not_among(NotServedError, scheduler, key, settings[key], allowed)
    for key, (needed, reason) in _REFUSED.items():
        if key in settings and settings[key] != needed:
            raise NotServedError(
                f"{scheduler} has {key} = {settings[key]!r}; {reason}",
                needed=f"{key} = {needed!r}",
                fix=f"set {key} to {needed!r}, or {_NAME_A_SOLVER}",
            )


def _not_among(
    kind: type[ScheduleError], scheduler: str, key: str, value: object, allowed: tuple[Any, ...]
) -> ScheduleError:
    return kind(
        f"{scheduler} has {key} = {value!r}",
        needed=f"one of {', '.join(repr(value) for value in allowed)}",
        fix=f"set {key} to one of these",
    )


def _check_kind(scheduler: str, key: str, default: object, value: object) -> None:
    """Refuse a value that is not of its default's kind; where there is no default, it may be missing too."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key in _LISTS:
        good, needed = isinstance(value, (list, tuple)) and all(map(_is_number, value)), "a list of numbers"
    elif isinstance(default, bool):
        good, needed = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        good, needed = whole and value >= 0, "a whole number of 0 or more"  # type: ignore[operator]
    elif isinstance(default, str):
        good, needed = isinstance(value, str), "text"
    else:
        good, needed = _is_number(value) or value == default == -math.inf, "a finite number"
    if not good and not (value is None and default is None):
        raise ScheduleError(f"{scheduler} has {key} = {value!r}", needed=needed, fix=f"set {key} to {needed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _check_ranges(settings: Mapping[str, Any]) -> None:
    for key in ("num_train_timesteps", "original_inference_steps"):
        if not 1 <= settings.get(key, 1) <= MAX_TIMESTEPS:
            found, needed = f"{key} is {settings[key]!r}", f"a whole number from 1 to {MAX_TIMESTEPS}"
            raise ScheduleError(found, needed=needed, fix="correct the config")
    low, high = settings.get("sigma_min"), settings.get("sigma_max")
    if any(sigma is not None and sigma <= 0 for sigma in (low, high)) or (low and high and low >= high):
        raise ScheduleError(
            f"sigma_min is {low!r} and sigma_max {high!r}",
            needed="0 < sigma_min < sigma_max",
            fix="correct them, or leave both out",
        )
    if "beta_schedule" not in settings:
        return
    start, end = settings["beta_start"], settings["beta_end"]
    if settings["beta_schedule"] == "scaled_linear" and min(start, end) < 0:
        raise ScheduleError(
            f"the betas run from {start!r} to {end!r}", needed="numbers between 0 and 1", fix="correct beta_start"
        )
    if settings["trained_betas"] is not None and not settings["trained_betas"]:
        raise ScheduleError(
            "trained_betas is empty", needed="a beta for each training timestep", fix="set trained_betas to null"
        )
