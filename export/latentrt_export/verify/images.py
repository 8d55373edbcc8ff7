"""The third depth: whole runs against the diffusers pipeline; and a batch against its own jobs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from latentrt.engine import Engine
from latentrt.errors import RequestError, ScheduleError
from latentrt.golden import example
from latentrt.run.job import Job
from latentrt_export.verify.checks import Array, Check, difference, not_served, psnr, worst
from latentrt_export.verify.reference import PROMPTS, Run, Theirs, comparing, run_pipeline

LATENTS_BOUND = 1e-3  # relative to the largest latent, of the whole pipeline
PSNR_BOUND = 50.0  # dB, of the final pixels
BATCH_PROMPTS = (*PROMPTS, "", "an owl on a branch")
BATCH_STEPS = 2
SOLVERS = (None, "dpmpp-2m", "euler-ancestral", "unipc")
UPSCALER_SOLVERS = (None, "heun")  # of those that diffusers' latent upscaler scales its latents by
PIXEL_SOLVERS = (None, "ddim", "dpmpp-2m")
GUIDANCES = (3.0, 1.0)


def image_checks(
    engine: Engine,
    pipelines: Theirs,
    steps: int,
    *,
    prompts: Sequence[str] = PROMPTS,
    solvers: Sequence[str | None] | None = None,
    guidances: Sequence[float] = GUIDANCES,
    negative: str = "blurry",
) -> Iterator[Check]:
    """Measure whole runs against the diffusers pipeline: same seeds, a batch of all prompts, latents at every step."""
    prompted = engine.model.text is not None
    own = UPSCALER_SOLVERS if "sigma" in engine.model.predictor.inputs else SOLVERS
    for solver in solvers or (own if prompted else PIXEL_SOLVERS):
        for guidance in guidances if prompted else (None,):
            settings: dict[str, Any] = {"steps": steps, "solver": solver, "seed": 7}
            what = f"{solver or engine.spec.defaults.solver or engine.schedule.scheduler}, {len(prompts)} pictures"
            if guidance is not None:
                settings |= {"guidance": guidance}
                settings |= {"negative_prompt": negative} if "negative_prompt" in engine.model.fields else {}
                what += f", guidance {guidance:g}"
            run = run_of(engine, prompts if prompted else [None] * len(prompts), settings)
            try:
                ours, pictures = run_engine(engine, run)
            except (ScheduleError, RequestError) as error:
                yield not_served("image", what, LATENTS_BOUND, error)
                continue
            with comparing("pipeline"):
                theirs, expected = run_pipeline(pipelines.pipeline(solver), run)
            largest = worst([difference(a, b) for a, b in zip(ours, theirs, strict=True)])
            yield Check("image", what, f"latents, worst of {len(theirs)} steps", largest, LATENTS_BOUND)
            yield Check("image", what, "PSNR, dB", psnr(pictures, expected), PSNR_BOUND, at_least=True)


def run_of(engine: Engine, prompts: Sequence[str | None], settings: dict[str, Any]) -> Run:
    """Return a run at the model's own size, with what else the model needs."""
    latents = engine.spec.latents
    needed, pictures = example(engine.model, max(latents.height, latents.width))
    return Run(prompts, {**needed, **settings}, pictures)


def run_engine(engine: Engine, run: Run) -> tuple[list[Array], Array]:
    """Return our latents after every row, (pictures, C, H, W) each, and the pixels, (pictures, H, W, 3) uint8."""
    jobs = engine.requests(run.prompts, run.settings, run.pictures)
    seen: list[list[Array]] = [[] for _ in jobs]

    def keep(job: Job) -> None:
        seen[jobs.index(job)].append(job.latents)

    engine.run(jobs, keep)
    pictures = np.stack([np.asarray(engine.picture(job)) for job in jobs])
    return [np.stack(step) for step in zip(*seen, strict=True)], pictures


def batch_check(engine: Engine) -> Check:
    """Compare four jobs in one batch with each alone: what shares a batch must not change a bit of a picture."""
    what, bound = f"{len(BATCH_PROMPTS)} jobs together, and each alone", 0.0
    prompted = engine.model.text is not None
    settings = {"steps": BATCH_STEPS, **({"guidance": 3.0} if prompted else {})}
    together_run = run_of(engine, BATCH_PROMPTS if prompted else [None] * len(BATCH_PROMPTS), {**settings, "seed": 7})
    prompts, own, pictures = together_run
    try:
        together = engine.requests(prompts, own, pictures)
        alone = [
            job
            for index, prompt in enumerate(prompts)
            for job in engine.requests([prompt], {**own, "seed": 7 + index}, pictures)
        ]
    except (ScheduleError, RequestError) as error:
        return not_served("batch", what, bound, error)
    engine.run(together)
    for job in alone:
        engine.run([job])
    pairs = zip(together, alone, strict=True)
    largest = worst([float(np.abs(a.latents - b.latents).max()) for a, b in pairs])
    return Check("batch", what, f"latents, max abs after {BATCH_STEPS} steps", largest, bound)
