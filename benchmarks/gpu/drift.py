"""The difference of latents in float16 from diffusers in float32, after every step, at full size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gpu.config import Config
from benchmarks.gpu.theirs import _need_device, draw, open_pipeline
from latentrt import Engine
from latentrt.run.job import Job

Latents = list[NDArray[np.float32]]


class Drift:
    """The float32 pipeline's latents, and those compared with it: same seed, prompt and solver."""

    def __init__(self, config: Config) -> None:
        self._config, self._hardware = config, config.open_hardware()
        _need_device(self._hardware.DEVICE)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        self._known: dict[int, Latents] = {}

    def drift(self, kind: str, steps: int) -> list[float]:
        """Return, after each step, the norm of the difference relative to the norm of the float32 latents.

        Args:
            kind: "diffusers" (in half precision), or a backend's name.
            steps: of the solver.
        """
        if steps not in self._known:
            self._known[steps] = self._diffusers("float32", steps)
        ours = self._diffusers(self._hardware.HALF, steps) if kind == "diffusers" else self._engine(kind, steps)
        pairs = zip(ours, self._known[steps], strict=True)
        return [float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs]

    def _diffusers(self, dtype: str, steps: int) -> Latents:
        found: Latents = []

        def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            found.append(tensors["latents"][0].float().cpu().numpy().copy())
            return tensors

        pipe, task = open_pipeline(self._config, self._hardware.DEVICE, dtype), self._config.task(0, 1)
        draw(pipe, self._config, task.prompts, task.seeds, steps, callback_on_step_end=keep, output_type="latent")
        return found

    def _engine(self, backend: str, steps: int) -> Latents:
        found: Latents = []
        task, opened = self._config.task(0, 1), self._config.open_backend(backend)
        try:
            assert self._config.bundle is not None
            with Engine.load(self._config.bundle, backend=opened, lanes=2) as engine:
                (job,) = engine.requests(task.prompts, {**self._config.settings, "steps": steps, "seed": task.seeds[0]})
                job.wants_preview = True  # so that its latents come back after every row

                def keep(job: Job) -> None:
                    found.append(job.latents.copy())

                engine.run([job], keep)
        finally:
            opened.gpu.close()
        return found

    def close(self) -> None:
        """Do nothing: the process ends next."""
