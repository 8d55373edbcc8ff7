"""What diffusers makes of a checkpoint: the other side of every measurement in `latentrt_export.verify.verify`."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from latentrt.engine import Engine
from latentrt.errors import ExportError, LatentrtError
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt_export.checkpoint.source import Checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import NOT_EXPORTED

Array = NDArray[Any]
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@contextmanager
def plain_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder of links to just the files that an export takes, under plain names: no pickles, one variant."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, path in checkpoint.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(path.resolve())
        index = {key: [None, None] if key in NOT_EXPORTED else value for key, value in checkpoint.index.items()}
        if checkpoint.family == "sd":
            index["requires_safety_checker"] = False
        (root / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
        yield root


@contextmanager
def comparing(what: str) -> Iterator[None]:
    """Say what of the checkpoint could not be loaded or run; torch and its libraries raise anything."""
    try:
        with quiet():
            yield
    except Exception as error:
        if isinstance(error, LatentrtError):
            raise
        raise incomparable(f"the checkpoint's {what} fails ({type(error).__name__}: {error})") from error


def incomparable(found: str) -> ExportError:
    return ExportError(found, needed="the checkpoint that the bundle was exported from")


def open_pipeline(checkpoint: Path, family: str) -> Any:
    """The diffusers pipeline of a plain folder, in float32 on the CPU."""
    with comparing("pipeline"):
        pipe = getattr(diffusers, PIPELINES[family]).from_pretrained(
            checkpoint, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def diffusers_scheduler(name: str | None, schedule: Schedule) -> Any:
    """The diffusers scheduler that a solver name stands for, made from the same config."""
    scheduler, settings = (SOLVERS[name].scheduler, SOLVERS[name].settings) if name else (schedule.scheduler, {})
    with quiet():
        return getattr(diffusers, scheduler).from_config(dict(schedule.config), **settings)


def stand_in(sample: Array) -> Array:
    """A network for the step depth: smooth, like a trained one, so that rounding is not blown up by its jumps."""
    return np.float32(0.8) * np.tanh(sample) + np.float32(0.1)


def run_scheduler(scheduler: Any, steps: int, shape: Sequence[int] = (1, 4, 8, 8)) -> Iterator[Array]:
    """A diffusers scheduler's latents after every step, with `stand_in` for a network."""
    with quiet():
        scheduler.set_timesteps(steps)
    noises = torch.Generator().manual_seed(2)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32)) * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    extra = {"generator": noises} if takes_generator else {}
    for timestep in scheduler.timesteps:
        output = torch.from_numpy(stand_in(scheduler.scale_model_input(x, timestep).numpy()))
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        yield x.numpy()


def run_pipeline(
    pipe: Any, engine: Engine, prompts: Sequence[str], settings: dict[str, Any]
) -> tuple[list[Array], Array]:
    """The diffusers pipeline's latents after every step and its pixels, in the forms of `run_engine`."""
    steps: list[Array] = []

    def keep(pipe: Any, index: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        steps.append(tensors["latents"].numpy().copy())
        return tensors

    latents = engine.spec.latents
    generators = [torch.Generator().manual_seed(settings["seed"] + i) for i in range(len(prompts))]
    with quiet():
        result = pipe(
            list(prompts),
            negative_prompt=[settings["negative_prompt"]] * len(prompts) if settings["guidance"] > 1 else None,
            num_inference_steps=settings["steps"],
            guidance_scale=settings["guidance"],
            height=latents.height * latents.factor,
            width=latents.width * latents.factor,
            generator=generators,
            callback_on_step_end=keep,
        )
    return steps, np.stack([np.asarray(image) for image in result.images])
