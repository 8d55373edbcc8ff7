"""How much of a denoising step is spent outside the network?

Measured: the time of whole steps and, within it, the time of the UNet's calls; what is left is guidance, the solver,
stacking the batch, the loop itself. Ours are all ticks of a run. diffusers' steps are the times between its own
callbacks, so from the second step on; what it does before the loop is not counted. No decoding.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

from benchmarks.cases import Config, Ours, Task, Theirs, race
from benchmarks.measures import Goal, Measure, Result, at_most
from latentrt.command.bench import Stopwatch
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes

TITLE = "Host time"
PERCENT, MILLISECONDS = "% of a step", "ms a step"


def measure(config: Config) -> Result:
    """Measure the part and the time of a step outside the UNet, for every other batch size, by both."""
    ours, theirs = Ours(config), Theirs(config)
    watch = Stopwatch(theirs.pipe.unet.forward)
    theirs.pipe.unet.forward = watch
    measures = []
    for size in config.batches[::2]:
        runs = race(partial(_our_steps, ours), partial(_their_steps, theirs, watch), config, size)
        for unit, column in ((PERCENT, 0), (MILLISECONDS, 1)):
            samples = {side: [sample.result[column] for sample in runs[side]] for side in runs}
            measures.append(Measure(f"batch {size}", unit, samples))
    return Result(measures)


def goals(result: Result) -> list[Goal]:
    """Return the charter's goals."""
    return [at_most("host time outside the network under 5% of a step (batch 1)", result.measures[0], 5)]


def _our_steps(ours: Ours, task: Task) -> tuple[float, float]:
    watch = Stopwatch(ours.engine.model.predictor)
    denoiser, jobs = Denoiser(HostLanes(watch, 2 * len(task.prompts))), ours.jobs(task)
    start = time.perf_counter()
    denoiser.run(jobs)
    return _host(time.perf_counter() - start, watch.seconds, task.steps)


def _their_steps(theirs: Theirs, watch: Stopwatch, task: Task) -> tuple[float, float]:
    marks: list[tuple[float, float]] = []

    def mark(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        marks.append((time.perf_counter(), watch.seconds))
        return values

    theirs.draw(task, output_type="latent", callback_on_step_end=mark)
    (start, unet_start), (end, unet_end) = marks[0], marks[-1]
    return _host(end - start, unet_end - unet_start, len(marks) - 1)


def _host(total: float, network: float, steps: int) -> tuple[float, float]:
    """Return percent and milliseconds of a step."""
    return 100 * (1 - network / total), 1000 * (total - network) / steps
