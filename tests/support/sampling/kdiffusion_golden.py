"""Make `kdiffusion_golden.json`: the results of k-diffusion's own samplers on a small problem.

    pip download k-diffusion==0.1.1 --no-deps && unzip k_diffusion-0.1.1-py3-none-any.whl
    python tests/support/sampling/kdiffusion_golden.py k_diffusion/sampling.py

k-diffusion asks for packages that its samplers do not need, so its one file is loaded alone. Only the denoiser and the
noise, which `test_solvers.py` shares, are ours.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

GOLDEN = Path(__file__).with_suffix(".json")
START = np.array([11.0, -7.0, 3.0, 0.5])
SIGMAS = [14.6, 9.1, 5.2, 2.8, 1.6, 0.9, 0.4, 0.1, 0.0]
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {  # our name: theirs, with arguments
    "euler": ("sample_euler", {}),
    "euler-ancestral": ("sample_euler_ancestral", {}),
    "heun": ("sample_heun", {}),
    "dpm2": ("sample_dpm_2", {}),
    "dpm2-ancestral": ("sample_dpm_2_ancestral", {}),
    "lms": ("sample_lms", {}),
    "dpmpp-2s-ancestral": ("sample_dpmpp_2s_ancestral", {}),
    "dpmpp-2m": ("sample_dpmpp_2m", {}),
    "dpmpp-2m-sde": ("sample_dpmpp_2m_sde", {"solver_type": "midpoint"}),
    "dpmpp-3m-sde-kdiffusion": ("sample_dpmpp_3m_sde", {}),
}


def denoise(x: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    """Return x0 for (x, sigma) with x = x0 + sigma * epsilon, by a denoiser that is not linear in x."""
    return np.asarray(x / (1 + sigma**2) + 0.5 * np.tanh(x / (1 + sigma)))


def noises() -> Iterator[NDArray[np.float64]]:
    rng = np.random.default_rng(2)
    while True:
        yield rng.standard_normal(START.shape)


def _load(path: str) -> ModuleType:
    for name in ("torchdiffeq", "torchsde", "k_diffusion", "k_diffusion.utils"):
        sys.modules[name] = ModuleType(name)
    sys.modules["torchdiffeq"].odeint = None  # type: ignore[attr-defined]
    sys.modules["k_diffusion"].utils = sys.modules["k_diffusion.utils"]  # type: ignore[attr-defined]
    append = lambda x, dims: x[(...,) + (None,) * (dims - x.ndim)]  # noqa: E731
    sys.modules["k_diffusion.utils"].append_dims = append  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("k_diffusion.sampling", path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    return module


def main(path: str) -> None:
    import torch

    sampling, results = _load(path), {}
    sigmas = torch.tensor(SIGMAS, dtype=torch.float64)
    for name, (function, arguments) in SAMPLERS.items():
        draws = noises()
        if "ancestral" in function or "sde" in function:
            arguments = {**arguments, "noise_sampler": lambda *_, draws=draws: torch.from_numpy(next(draws))[None]}
        model = lambda x, sigma: torch.from_numpy(denoise(x.numpy(), float(sigma[0])))  # noqa: E731
        x = torch.from_numpy(START)[None]
        results[name] = getattr(sampling, function)(model, x, sigmas, disable=True, **arguments)[0].tolist()
    GOLDEN.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
