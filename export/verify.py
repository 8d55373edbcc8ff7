"""Parity with diffusers, measured at three depths: network, step, image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends import open_backend
from engine.bundle import Bundle
from engine.denoiser import Job
from engine.golden import TOLERANCE, measure, worst_error
from engine.pipeline import Engine
from engine.schedule import Schedule
from engine.solvers import SOLVERS
from engine.spec import Golden, GraphSpec, ModelSpec
from engine.table import advance, tabulate
from export.to_onnx import quiet
from export.wrap import load_network

Array = NDArray[Any]
NETWORK_BOUND = 1e-4  # relative L2 of a graph's outputs
STEP_BOUND = 1e-5  # relative to the largest latent, at every step
LATENTS_BOUND = 1e-3  # the same, of the whole pipeline
PSNR_BOUND = 50.0  # dB, of the final pixels
PROMPTS = ("a red apple", "a cat face")
IMAGE_SOLVERS = (None, "dpmpp-2m", "euler-ancestral", "unipc")
PIPELINES = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its bound. `at_least` is for quantities that should be large (dB)."""

    depth: str
    what: str
    measure: str
    value: float
    bound: float
    at_least: bool = False

    @property
    def passed(self) -> bool:
        """Whether the value keeps its bound; NaN never does."""
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "passed": self.passed}


def verify(bundle: str | Path, checkpoint: str | Path, *, steps: int = 20) -> Iterator[Check]:
    """Measure a bundle against a diffusers checkpoint, one check at a time.

    Args:
        bundle: the bundle to measure; its hashes are checked.
        checkpoint: the diffusers folder that it must equal (a bundle is one too).
        steps: solver steps of the step and image depths.
    """
    opened = Bundle.open(bundle)
    with Engine.load(bundle) as engine:
        if opened.spec.golden:
            yield Check("golden", "known runs", "relative error", worst_error(engine), TOLERANCE)
        yield from network_checks(engine, Path(checkpoint))
        yield from step_checks(engine.schedule, steps)
        yield from image_checks(engine, Path(checkpoint), steps)


def golden_runs(root: Path, spec: ModelSpec) -> tuple[Golden, ...]:
    """Measure the golden runs of a bundle that has no manifest yet (the hook of `export_bundle`)."""
    with Engine(Bundle(root, spec, {}), open_backend("onnxruntime")) as engine:
        return measure(engine)


def network_checks(engine: Engine, checkpoint: Path) -> Iterator[Check]:
    """Every graph against its torch module in float32, at the model's own size, with a batch of two."""
    spec = engine.spec
    tokens = int(spec.graphs[spec.text_encoders[0]].inputs[0].shape[1])
    for name, graph in spec.graphs.items():
        with quiet():
            module = load_network(checkpoint, name, family=spec.family, tokens=tokens).module
        feeds = random_feeds(graph, engine, seed=0)
        ours = engine.backend.load(engine.bundle.path(graph.path), graph)(feeds)
        with torch.no_grad():
            theirs = module(*(torch.from_numpy(feeds[tensor.name]) for tensor in graph.inputs))
        theirs = theirs if isinstance(theirs, tuple) else (theirs,)
        for tensor, expected in zip(graph.outputs, theirs, strict=True):
            difference = ours[tensor.name] - expected.numpy()
            error = float(np.linalg.norm(difference) / np.linalg.norm(expected.numpy()))
            worst = float(np.abs(difference).max())
            yield Check("network", f"{name}: {tensor.name}", f"relative L2 (max abs {worst:.1e})", error, NETWORK_BOUND)


def random_feeds(graph: GraphSpec, engine: Engine, seed: int, batch: int = 2) -> dict[str, Array]:
    """Inputs of a graph's signature: token ids, timesteps and normal numbers."""
    draw, latents = np.random.default_rng(seed), engine.spec.latents
    scale = latents.factor if "encoder" in graph.path and graph.path.startswith("vae") else 1
    sizes = {"batch": batch, "height": latents.height * scale, "width": latents.width * scale}
    feeds: dict[str, Array] = {}
    for tensor in graph.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        if tensor.dtype == "int64":
            feeds[tensor.name] = draw.integers(0, 1000, shape)
        elif tensor.name == "timestep":
            feeds[tensor.name] = draw.uniform(0, 1000, shape).astype(np.float32)
        else:
            feeds[tensor.name] = draw.standard_normal(shape, np.float32)
    return feeds


def step_checks(schedule: Schedule, steps: int) -> Iterator[Check]:
    """Every solver's table on this schedule against its diffusers scheduler, both fed the same outputs."""
    for name, solver in SOLVERS.items():
        if name in NO_DIFFUSERS_TWIN:
            continue
        scheduler = diffusers_scheduler(name, schedule)
        ours, theirs = run_table(name, schedule, steps), run_scheduler(scheduler, steps)
        pairs = list(zip(ours, theirs, strict=True))
        error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)
        yield Check("step", f"{name}: {solver.scheduler}", f"worst of {len(pairs)} rows", error, STEP_BOUND)


NO_DIFFUSERS_TWIN = ("dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion")


def diffusers_scheduler(name: str | None, schedule: Schedule) -> Any:
    """The diffusers scheduler that a solver name stands for, made from the same config."""
    scheduler, settings = (SOLVERS[name].scheduler, SOLVERS[name].settings) if name else (schedule.scheduler, {})
    with quiet():
        return getattr(diffusers, scheduler).from_config(dict(schedule.config), **settings)


def run_table(name: str, schedule: Schedule, steps: int, shape: Sequence[int] = (1, 4, 8, 8)) -> Iterator[Array]:
    """Our latents after every row, with outputs and noise drawn by seeds."""
    table = tabulate(name, schedule, steps)
    outputs, noises = np.random.default_rng(1), torch.Generator().manual_seed(2)
    x = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(table.start)
    memory = np.zeros((4, *shape), np.float32)
    for row in table.rows:
        noise = torch.randn(shape, generator=noises).numpy() if row.c else None
        x = advance(row, x, outputs.standard_normal(shape, np.float32), memory, noise)
        yield x


def run_scheduler(scheduler: Any, steps: int, shape: Sequence[int] = (1, 4, 8, 8)) -> Iterator[Array]:
    """A diffusers scheduler's latents after every step, with the same outputs and noise."""
    with quiet():
        scheduler.set_timesteps(steps)
    outputs, noises = np.random.default_rng(1), torch.Generator().manual_seed(2)
    x = torch.from_numpy(np.random.default_rng(0).standard_normal(shape, np.float32)) * scheduler.init_noise_sigma
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    extra = {"generator": noises} if takes_generator else {}
    for timestep in scheduler.timesteps:
        scheduler.scale_model_input(x, timestep)
        output = torch.from_numpy(outputs.standard_normal(shape, np.float32))
        x = scheduler.step(output, timestep, x, **extra).prev_sample
        yield x.numpy()


def image_checks(
    engine: Engine,
    checkpoint: Path,
    steps: int,
    *,
    prompts: Sequence[str] = PROMPTS,
    solvers: Sequence[str | None] = IMAGE_SOLVERS,
    guidances: Sequence[float] = (3.0, 1.0),
    negative: str = "blurry",
) -> Iterator[Check]:
    """Whole runs against the diffusers pipeline: same seeds, a batch of all prompts, latents at every step."""
    with quiet():
        pipeline = getattr(diffusers, PIPELINES[engine.spec.family])
        pipe = pipeline.from_pretrained(checkpoint, torch_dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    for solver in solvers:
        pipe.scheduler = diffusers_scheduler(solver, engine.schedule)
        for guidance in guidances:
            settings = {"steps": steps, "solver": solver, "seed": 7, "guidance": guidance, "negative_prompt": negative}
            ours, pictures = run_engine(engine, prompts, settings)
            theirs, expected = run_pipeline(pipe, engine, prompts, settings)
            error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))
            what = f"{solver or engine.schedule.scheduler}, guidance {guidance:g}, {len(prompts)} prompts"
            yield Check("image", what, f"latents, worst of {len(theirs)} steps", error, LATENTS_BOUND)
            yield Check("image", what, "PSNR, dB", psnr(pictures, expected), PSNR_BOUND, at_least=True)


def run_engine(engine: Engine, prompts: Sequence[str], settings: dict[str, Any]) -> tuple[list[Array], Array]:
    """Our latents after every row, (prompts, C, H, W) each, and the pixels, (prompts, H, W, 3) uint8."""
    jobs = engine.requests(prompts, settings)
    seen: list[list[Array]] = [[] for _ in jobs]

    def keep(job: Job) -> None:
        seen[jobs.index(job)].append(job.latents)

    engine.run(jobs, keep)
    pictures = np.stack([np.asarray(engine.picture(job)) for job in jobs])
    return [np.stack(step) for step in zip(*seen, strict=True)], pictures


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


def psnr(ours: Array, theirs: Array) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")
