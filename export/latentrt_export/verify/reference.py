"""What diffusers makes of a checkpoint: the other side of every measurement in `latentrt_export.verify.verify`."""

from __future__ import annotations

import copy
import functools
import inspect
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from latentrt.engine import Engine
from latentrt.errors import ExportError, LatentrtError
from latentrt.model.given import MASKED_STRENGTH, STRENGTH
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import EVERY_SOLVER
from latentrt_export.checkpoint.corrections import drawn_by
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.source import Checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import NOT_EXPORTED, plain_index

Array = NDArray[Any]
NOTHING: Mapping[str, Any] = {}
PROMPTS = ("a red apple", "a cat face")
CONDITIONS = ("aesthetic_score", "negative_aesthetic_score", "noise_level")  # settings that both sides name alike


class Run(NamedTuple):
    """A request as both sides get it: prompts (None: the model reads none), settings by our names, given pictures."""

    prompts: Sequence[str | None]
    settings: Mapping[str, Any]
    pictures: Mapping[str, Any]


@contextmanager
def plain_folder(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder of links to just the files that an export takes, under plain names: no pickles, one variant."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, path in checkpoint.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(path.resolve())
        (root / "model_index.json").write_text(json.dumps(plain_index(checkpoint)), encoding="utf-8")
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


class Theirs:
    """A checkpoint's diffusers pipeline as `from_pretrained` loads it, in float32 on the CPU.

    Args:
        checkpoint: a plain folder.
        engine: has the bundle that is compared with it.
    """

    def __init__(self, checkpoint: Path, engine: Engine) -> None:
        named = read_json(checkpoint / "model_index.json")["_class_name"]
        model = engine.model
        kind = drawn_by(named, masked=model.reads_masks, scored="aesthetic_score" in model.fields)
        with comparing("pipeline"):
            loader = getattr(diffusers, kind)
            absent = {name: None for name in NOT_EXPORTED if name in inspect.signature(loader).parameters}
            self._loaded = loader.from_pretrained(
                checkpoint, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True, **absent
            )
        self._own = engine.spec.defaults.solver
        self.scheduler = copy.deepcopy(self._loaded.scheduler)
        if kind == "LatentConsistencyModelPipeline":  # which runs one scheduler alone
            self._loaded = diffusers.StableDiffusionPipeline(**self._loaded.components, requires_safety_checker=False)

    def pipeline(self, solver: str | None = None, kind: str | None = None, **parts: Any) -> Any:
        """Return the pipeline with the scheduler of a solver of ours; None is the checkpoint's own.

        `kind` is the diffusers class, where it is not the one that draws from a prompt, and `parts` what that has more.
        """
        pipe = self._loaded
        if not hasattr(pipe, "vae"):  # pixels: these pipelines belong to their schedulers
            ddim = (solver or self._own) == "ddim"
            pipe = (diffusers.DDIMPipeline if ddim else diffusers.DDPMPipeline)(pipe.unet, self.scheduler)
            pipe.scheduler = pipe.scheduler if ddim else diffusers_scheduler(solver, self.scheduler)
        else:
            if kind is not None:  # without its VAE it drops a tiny one
                pipe = getattr(diffusers, kind).from_pipe(pipe, vae=pipe.vae, **parts)
            pipe.scheduler = diffusers_scheduler(solver, self.scheduler)
        pipe.set_progress_bar_config(disable=True)
        return pipe


def diffusers_scheduler(solver: str | None, loaded: Any, **settings: Any) -> Any:
    """Return the scheduler that a solver of ours stands for, as a user makes it from the pipeline's own.

    Args:
        solver: by name; None is the pipeline's own.
        loaded: the pipeline's own scheduler; it is not changed. One of its own class keeps what the pipeline corrected.
        settings: of the scheduler.
    """
    config = dict(loaded.config)
    kind, own = (
        (getattr(diffusers, EVERY_SOLVER[solver].scheduler), EVERY_SOLVER[solver].settings) if solver else (None, {})
    )
    if kind is None or isinstance(loaded, kind):
        config.pop("_use_default_values", None)
    with quiet():
        return (kind or type(loaded)).from_config(config, **{**own, **settings})


def scheduler_of(schedule: Schedule) -> Any:
    """Return the diffusers scheduler of a schedule that has no pipeline."""
    with quiet():
        return getattr(diffusers, schedule.scheduler).from_config(dict(schedule.config))


def run_pipeline(pipe: Any, run: Run, told: Mapping[str, Any] = NOTHING) -> tuple[list[Array], Array]:
    """Return the diffusers pipeline's latents after every step and its pixels, in the forms of `run_engine`.

    `told` are arguments of this pipeline alone.
    """
    steps: list[Array] = []
    step = pipe.scheduler.step

    def keep(*arguments: Any, **named: Any) -> Any:
        answer = step(*arguments, **named)
        steps.append(answer[0].numpy().copy())
        return answer

    pipe.scheduler.step = functools.update_wrapper(keep, step)  # pipelines look at its signature
    count, settings = len(run.prompts), run.settings
    generators = [torch.Generator().manual_seed(settings["seed"] + i) for i in range(count)]
    own = {"batch_size": count} if run.prompts[0] is None else _prompted(pipe, run)
    if "class_label" in settings:  # no pipeline passes one: people call the UNet themselves
        labels = torch.full((count,), settings["class_label"])
        pipe.unet.forward = functools.partial(pipe.unet.forward, class_labels=labels)
    try:
        with quiet():
            result = pipe(generator=generators, num_inference_steps=settings["steps"], **{**own, **told})
    finally:
        pipe.scheduler.step = step
    return steps, np.stack([np.asarray(image) for image in result.images])


def _is_negated(settings: Mapping[str, Any]) -> bool:
    return settings["guidance"] > 1 and "negative_prompt" in settings


def _prompted(pipe: Any, run: Run) -> dict[str, Any]:
    """What a pipeline with a prompt is called with: of all that the run has, what this pipeline takes."""
    settings, count = run.settings, len(run.prompts)
    masked = "mask" in run.pictures
    own = {
        "prompt": list(run.prompts),
        "negative_prompt": [settings["negative_prompt"]] * count if _is_negated(settings) else None,
        "guidance_scale": settings["guidance"],
        "height": settings["height"],
        "width": settings["width"],
        "strength": settings.get("strength", MASKED_STRENGTH if masked else STRENGTH),
        **{name: settings[name] for name in CONDITIONS if name in settings},
    }
    if "image_guidance" in settings:
        own["image_guidance_scale"] = settings["image_guidance"]
    for name, theirs in (("image", "image"), ("mask", "mask_image")):
        if name in run.pictures:
            own[theirs] = [Image.fromarray(run.pictures[name])] * count
    if "depth" in run.pictures:
        own["depth_map"] = torch.from_numpy(run.pictures["depth"].astype(np.float32))[None]
    taken = inspect.signature(pipe.__call__).parameters
    return {name: value for name, value in own.items() if name in taken}
