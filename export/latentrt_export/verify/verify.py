"""Parity with diffusers, measured at three depths (network, step, image), and of a batch with its own jobs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import Golden, GraphSpec, ModelSpec
from latentrt.engine import Engine
from latentrt.errors import LatentrtError, RequestError, ScheduleError
from latentrt.golden import TOLERANCE, measure, worst_error
from latentrt.model.tokenizer import Tokenizer
from latentrt.run.job import Job
from latentrt.runtime import open_backend
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import advance, tabulate
from latentrt_export.checkpoint.source import Checkpoint, checkpoint_of
from latentrt_export.graphs.half import emulate
from latentrt_export.graphs.ranges import open_session
from latentrt_export.graphs.wrap import load_network
from latentrt_export.verify.reference import (
    comparing,
    diffusers_scheduler,
    incomparable,
    open_pipeline,
    plain_folder,
    run_pipeline,
    run_scheduler,
    stand_in,
)

Array = NDArray[Any]
Arrays = Mapping[str, Array]
NETWORK_BOUND = 2e-5  # relative L2 of a graph's outputs
LARGEST_BOUND = 4e-5  # the largest difference of one number, relative to the largest output
HALF_BOUND = 5e-3  # relative L2 of a float16 graph to the float32 one
STEP_BOUND = 1e-5  # relative to the largest latent, at every step
STEP_DEPTH_STEPS = 100
LATENTS_BOUND = 1e-3  # the same, of the whole pipeline
PSNR_BOUND = 50.0  # dB, of the final pixels
PROMPTS = ("a red apple", "a cat face")
BATCH_PROMPTS = (*PROMPTS, "", "an owl on a branch")
BATCH_STEPS = 2
ODD_SIDE = 16  # of the second, odd size's latents at most, so that full-size models take seconds
IMAGE_SOLVERS = (None, "dpmpp-2m", "euler-ancestral", "unipc")


@dataclass(frozen=True, slots=True)
class Check:
    """One measurement against its bound.

    `at_least` is for quantities that should be large (dB). A `value` of None is what latentrt does not serve, and
    `note` says why.
    """

    depth: str
    what: str
    measure: str
    value: float | None
    bound: float
    at_least: bool = False
    note: str = ""

    @property
    def passed(self) -> bool | None:
        """Whether the value keeps its bound; NaN never does. None: there is nothing to keep it."""
        if self.value is None:
            return None
        return self.value >= self.bound if self.at_least else self.value <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN and no infinity: those are text."""
        finite = self.value is None or math.isfinite(self.value)
        return {**asdict(self), "value": self.value if finite else str(self.value), "passed": self.passed}


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    steps: int = 20,
    revision: str | None = None,
    variant: str | None = None,
) -> Iterator[Check]:
    """Measure a bundle against a diffusers checkpoint, one check at a time.

    Args:
        bundle: the bundle to measure; its hashes are checked.
        checkpoint: the diffusers folder, hub id or preset:NAME that it must equal (a bundle is such a folder too).
        steps: solver steps of the step depth (100 at most) and of the image depth.
        revision, variant: of the checkpoint, as in `open_checkpoint`.

    Raises:
        BundleError: the bundle is none, or is damaged.
        ExportError: the checkpoint is none, or one that the bundle cannot be compared with.
        UnsafeWeightsError: the checkpoint has pickled weights only.
    """
    opened = Bundle.open(bundle)
    with checkpoint_of(checkpoint, revision, variant) as source:
        yield from _verify(opened, source, steps)


def _verify(opened: Bundle, source: Checkpoint, steps: int) -> Iterator[Check]:
    if source.family != opened.spec.family:
        raise incomparable(f"{source.id} is of the family {source.family}, {opened.root} of {opened.spec.family}")
    with plain_folder(source) as folder, Engine.load(opened.root, check_hashes=False) as engine:
        if opened.spec.golden:
            yield Check("golden", "known runs", "relative error", worst_error(engine), TOLERANCE)
        yield from network_checks(engine, folder)
        yield from step_checks(engine.schedule, steps)
        yield from image_checks(engine, folder, steps)
        yield batch_check(engine)


def golden_runs(root: Path, spec: ModelSpec) -> tuple[Golden, ...]:
    """Measure the golden runs of a bundle that has no manifest yet (the hook of `export_bundle`)."""
    with Engine(Bundle(root, spec, {}), open_backend("onnxruntime")) as engine:
        return measure(engine)


def network_checks(engine: Engine, checkpoint: Path) -> Iterator[Check]:
    """Every graph against its torch module in float32: two prompts at the model's own size, one at an odd size."""
    spec = engine.spec
    tokens = int(spec.graphs[spec.text_encoders[0]].inputs[0].shape[1])
    own = spec.latents.height, spec.latents.width
    odd = min(own[0], ODD_SIDE) - 3, min(own[1], ODD_SIDE) + 2
    for name, graph in spec.graphs.items():
        runs: list[tuple[Arrays, Arrays]] = []
        with comparing(name):
            module = load_network(checkpoint, name, family=spec.family, tokens=tokens).module
        network = engine.backend.load(engine.bundle, name)
        pairs: dict[str, list[tuple[Array, Array]]] = {tensor.name: [] for tensor in graph.outputs}
        for prompts, size in ((PROMPTS, own), (PROMPTS[:1], odd)):
            feeds = make_feeds(engine, name, prompts, size)
            ours = network(feeds)
            runs.append((feeds, ours))
            with torch.no_grad(), comparing(name):
                theirs = module(*(torch.from_numpy(feeds[tensor.name]) for tensor in graph.inputs))
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            for tensor, expected in zip(graph.outputs, theirs, strict=True):
                pairs[tensor.name].append((ours[tensor.name], expected.numpy()))
        for output, values in pairs.items():
            with comparing(name):  # outputs of other shapes
                l2 = _worst([_relative_l2(a, b) for a, b in values])
                largest = _worst([_difference(a, b) for a, b in values])
            yield Check("network", f"{name}: {output}", "relative L2, worst of 2 sizes", l2, NETWORK_BOUND)
            yield Check("network", f"{name}: {output}", "max abs, relative to the largest", largest, LARGEST_BOUND)
        network.close()
        if name in spec.half:
            yield half_check(engine.bundle.path(spec.half[name].path), spec.half[name], name, runs)


def half_check(path: Path, graph: GraphSpec, name: str, runs: Sequence[tuple[Arrays, Arrays]]) -> Check:
    """A half graph against its float32 one, on the same feeds, rounding as a GPU would."""
    model = ir.load(path)
    emulate(model)
    session = open_session(model, path.parent)
    names = [tensor.name for tensor in graph.outputs]
    errors = []
    for feeds, expected in runs:
        narrow = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in graph.inputs}
        for output, array in zip(names, session.run(names, narrow), strict=True):
            errors.append(_relative_l2(array.astype(np.float32), expected[output]))
    return Check(
        "network", f"{name} in float16", "relative L2 to float32, worst of 2 sizes", _worst(errors), HALF_BOUND
    )


def _relative_l2(ours: Array, theirs: Array) -> float:
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def _difference(ours: Array, theirs: Array) -> float:
    """The largest difference, relative to the largest number: units and scales fall out."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def _worst(values: Sequence[float]) -> float:
    """The largest; numpy's maximum keeps a NaN, Python's loses one that is not first."""
    return float(np.max(values))


def make_feeds(engine: Engine, name: str, prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Array]:
    """Inputs of a graph: the prompts' tokens and text states, timesteps, and normal numbers for latents and pixels.

    `size` is the latents' (height, width).
    """
    spec, draw = engine.spec, np.random.default_rng(0)
    if name in spec.text_encoders:
        tokenizer = Tokenizer.open(engine.bundle.path(spec.tokenizers[spec.text_encoders.index(name)]))
        return {"input_ids": np.stack([tokenizer.encode(prompt).ids for prompt in prompts])}
    texts = [engine.text_encoder.encode(prompt) for prompt in prompts]
    scale = spec.latents.factor if name == "vae_encoder" else 1
    height, width = (side * scale for side in size)
    sizes = {"batch": len(prompts), "height": height, "width": width}
    pixels = [side * spec.latents.factor for side in size]
    feeds: dict[str, Array] = {}
    for tensor in spec.graphs[name].inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.shape]
        if tensor.name in texts[0]:
            feeds[tensor.name] = np.stack([text[tensor.name] for text in texts])
        elif tensor.name == "time_ids":
            feeds[tensor.name] = np.array([[*pixels, 0, 0, *pixels]] * len(prompts), np.float32)
        elif tensor.name == "timestep":
            feeds[tensor.name] = draw.uniform(0, 1000, shape).astype(np.float32)
        else:
            feeds[tensor.name] = draw.standard_normal(shape, np.float32)
    return feeds


def batch_check(engine: Engine) -> Check:
    """Four jobs in one batch against each alone: what shares a batch must not change a bit of a picture."""
    what, bound = f"{len(BATCH_PROMPTS)} jobs together, and each alone", 0.0
    settings = {"steps": BATCH_STEPS, "guidance": 3.0}
    try:
        together = engine.requests(BATCH_PROMPTS, {**settings, "seed": 7})
        alone = [j for i, p in enumerate(BATCH_PROMPTS) for j in engine.requests([p], {**settings, "seed": 7 + i})]
    except (ScheduleError, RequestError) as error:
        return _not_served("batch", what, bound, error)
    engine.run(together)
    for job in alone:
        engine.run([job])
    pairs = zip(together, alone, strict=True)
    worst = _worst([float(np.abs(a.latents - b.latents).max()) for a, b in pairs])
    return Check("batch", what, f"latents, max abs after {BATCH_STEPS} steps", worst, bound)


def _not_served(depth: str, what: str, bound: float, error: LatentrtError) -> Check:
    return Check(depth, what, "not served", None, bound, note=error.found)


def step_checks(schedule: Schedule, steps: int) -> Iterator[Check]:
    """Every solver's table on this schedule against its diffusers scheduler, with the same stand-in for a network.

    At 100 steps at most: over closer levels diffusers' own float32 reaches the bound (its third-order SDE solver is off
    by 1.1e-5 at 200 steps, and agrees to 1e-13 in float64: tests/sampling/test_scheduler_parity.py).
    """
    steps = min(steps, STEP_DEPTH_STEPS)
    for name, solver in SOLVERS.items():
        if name in NO_DIFFUSERS_TWIN:
            continue
        what = f"{name}: {solver.scheduler}"
        if name in COARSE_AT_ZERO_SNR and schedule.config.get("rescale_betas_zero_snr"):
            note = "diffusers' own float32 is coarser than the bound where sigma starts at 4096"
            yield Check("step", what, "not compared", None, STEP_BOUND, note=note)
            continue
        try:
            ours = list(run_table(name, schedule, steps))
        except (ScheduleError, RequestError) as error:
            yield _not_served("step", what, STEP_BOUND, error)
            continue
        with comparing(solver.scheduler):
            theirs = list(run_scheduler(diffusers_scheduler(name, schedule), steps))
        worst = _worst([_difference(a, b) for a, b in zip(ours, theirs, strict=True)])
        yield Check("step", what, f"worst of {len(ours)} rows", worst, STEP_BOUND)


COARSE_AT_ZERO_SNR = ("euler", "euler-ancestral")
NO_DIFFUSERS_TWIN = ("dpmpp-2s-ancestral", "dpmpp-3m-sde-kdiffusion")


def run_table(name: str, schedule: Schedule, steps: int, shape: Sequence[int] = (1, 4, 8, 8)) -> Iterator[Array]:
    """Our latents after every row, with `stand_in` for a network and noise drawn by a seed."""
    table = tabulate(name, schedule, steps)
    noises = torch.Generator().manual_seed(2)
    x = np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(table.start)
    memory = np.zeros((4, *shape), np.float32)
    for row in table.rows:
        noise = torch.randn(shape, generator=noises).numpy() if row.c else None
        x = advance(row, x, stand_in(np.float32(row.c_in) * x), memory, noise)
        yield x


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
    pipe = open_pipeline(checkpoint, engine.spec.family)
    for solver in solvers:
        for guidance in guidances:
            settings = {"steps": steps, "solver": solver, "seed": 7, "guidance": guidance, "negative_prompt": negative}
            what = f"{solver or engine.schedule.scheduler}, guidance {guidance:g}, {len(prompts)} prompts"
            try:
                ours, pictures = run_engine(engine, prompts, settings)
            except (ScheduleError, RequestError) as error:
                yield _not_served("image", what, LATENTS_BOUND, error)
                continue
            with comparing("pipeline"):
                pipe.scheduler = diffusers_scheduler(solver, engine.schedule)
                theirs, expected = run_pipeline(pipe, engine, prompts, settings)
            worst = _worst([_difference(a, b) for a, b in zip(ours, theirs, strict=True)])
            yield Check("image", what, f"latents, worst of {len(theirs)} steps", worst, LATENTS_BOUND)
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


def psnr(ours: Array, theirs: Array) -> float:
    """Peak signal-to-noise ratio of uint8 pictures in dB; infinite where they are equal."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else float("inf")
