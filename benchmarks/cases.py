"""The two sides and their common task: the same model, pictures, threads, steps, solver and seeds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.measures import OURS, THEIRS
from benchmarks.timing import Sample, paired
from latentrt.bundle.bundle import EMBEDDED
from latentrt.request import Request
from latentrt.sampling.solvers import SOLVERS

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.run.job import Job

COLOURS = ("red", "green", "blue", "yellow")
THINGS = ("apple", "heart", "car", "fish")
PROMPTS = tuple(f"a {colour} {thing}" for thing in THINGS for colour in COLOURS)


@dataclass(frozen=True, slots=True)
class Config:
    """Settings of a measurement. `threads` holds for both sides; `repeats` rounds are kept, `warmup` rounds are not."""

    steps: int = 20
    repeats: int = 5
    warmup: int = 1
    threads: int = len(os.sched_getaffinity(0))
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    arrivals: int = 16
    solver: str = "dpmpp-2m"
    guidance: float = 3.0
    seed: int = 7
    bundle: Path = EMBEDDED

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON, without the bundle's path."""
        return {key: value for key, value in asdict(self).items() if key != "bundle"}


QUICK = Config(steps=2, repeats=1, warmup=0, threads=1, batches=(1, 2), arrivals=3)


@dataclass(frozen=True, slots=True)
class Task:
    """Pictures that are made together: a prompt and a seed each, the rest in common."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: int
    solver: str
    guidance: float

    @property
    def kind(self) -> tuple[Any, ...]:
        """What tasks must have in common to be made in one diffusers call."""
        return self.steps, self.solver, self.guidance


Run = Callable[[Task], Any]


def task(config: Config, round_: int = 0, size: int = 1) -> Task:
    """Return `size` pictures of prompts that no other round or size has, so that no side gains from its cache."""
    numbers = range(round_ * size, (round_ + 1) * size)
    prompts = tuple(f"{PROMPTS[number % len(PROMPTS)]} {size} {number}" for number in numbers)
    seeds = tuple(config.seed + number for number in numbers)
    return Task(prompts, seeds, config.steps, config.solver, config.guidance)


def together(tasks: Sequence[Task]) -> Task:
    """Return one task of several of one kind."""
    prompts = tuple(prompt for each in tasks for prompt in each.prompts)
    seeds = tuple(seed for each in tasks for seed in each.seeds)
    return Task(prompts, seeds, *tasks[0].kind)


class Ours:
    """latentrt with room for `pictures` guided pictures in one batch."""

    def __init__(self, config: Config, pictures: int = 1) -> None:
        from latentrt import Engine

        self.engine = Engine.load(config.bundle, threads=config.threads, lanes=2 * pictures)

    def jobs(self, task: Task) -> list[Job]:
        """Return a job for each picture, not yet admitted."""
        common: dict[str, Any] = {"steps": task.steps, "solver": task.solver, "guidance": task.guidance}
        pairs = zip(task.prompts, task.seeds, strict=True)
        requests = [Request(prompt=prompt, seed=seed, **common) for prompt, seed in pairs]
        return [job for request in requests for job in self.engine.jobs(request)]

    def draw(self, task: Task) -> list[Image]:
        """Draw pictures from prompts."""
        jobs = self.jobs(task)
        self.engine.run(jobs)
        return [self.engine.picture(job) for job in jobs]


class Theirs:
    """diffusers' own pipeline on the same folder, float32, no progress bar, never on the network."""

    def __init__(self, config: Config) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
        import torch
        import transformers
        from diffusers import StableDiffusionPipeline
        from diffusers.utils.logging import disable_progress_bar

        disable_progress_bar()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(config.threads)
        self.pipe = StableDiffusionPipeline.from_pretrained(config.bundle, dtype=torch.float32, local_files_only=True)
        self.pipe.set_progress_bar_config(disable=True)
        self._settings = self.pipe.scheduler.config
        self._schedulers: dict[str, Any] = {}

    def draw(self, task: Task, **more: Any) -> Any:
        """Draw pictures from prompts; `more` goes to the pipeline's call."""
        import torch

        self.pipe.scheduler = self._scheduler(task.solver)
        return self.pipe(
            list(task.prompts),
            num_inference_steps=task.steps,
            guidance_scale=task.guidance,
            generator=[torch.Generator().manual_seed(seed) for seed in task.seeds],
            **more,
        ).images

    def _scheduler(self, name: str) -> Any:
        import diffusers

        if name not in self._schedulers:
            solver = SOLVERS[name]
            scheduler = getattr(diffusers, solver.scheduler)
            self._schedulers[name] = scheduler.from_config(self._settings, **solver.settings)
        return self._schedulers[name]


def race(ours: Run, theirs: Run, config: Config, size: int = 1) -> dict[str, list[Sample]]:
    """Give both the same task of `size` pictures, in turn, another one every round."""

    def side(run: Run) -> Callable[[int], Any]:
        return lambda round_: run(task(config, round_, size))

    return paired({OURS: side(ours), THEIRS: side(theirs)}, config.repeats, config.warmup)


def agreement(runs: Mapping[str, Sequence[Sample]]) -> float:
    """Return the least PSNR of a race whose results are pictures, in dB."""
    return min(psnr(a.result, b.result) for a, b in zip(*runs.values(), strict=True))


def psnr(a: Sequence[Image], b: Sequence[Image]) -> float:
    """Return the least peak signal-to-noise ratio over pairs of pictures, in dB; 99 for pictures that are the same."""
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in zip(a, b, strict=True)]
    errors = [np.square(x - y).mean() for x, y in pairs]
    return min(10 * float(np.log10(255**2 / error)) if error else 99.0 for error in errors)
