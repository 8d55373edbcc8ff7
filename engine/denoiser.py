"""The one loop: jobs take lanes, a tick calls the network once over all lanes and advances every job by one row.

Whether one picture is made or a server is busy, this is what runs; only who admits jobs differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.errors import LatentrtError, NetworkError, RequestError
from engine.guidance import Guidance
from engine.models import Conditioning
from engine.noise import NoiseSource
from engine.table import SLOTS, Row, Table, advance, preview

Float32 = NDArray[np.float32]
Predict = Callable[[Float32, Float32, Conditioning], Float32]


@dataclass(slots=True, eq=False)
class Job:
    """One image being made.

    Attributes:
        table: the rows to run.
        latents: x, (channels, height, width) float32, as the table's solver scales it.
        cond, uncond: conditionings of the prompt and of the negative prompt; without guidance uncond is not read.
        noise: where rows that add noise draw it.
        row: index of the next row.
        wants_preview: whether ticks leave the predicted clean latents in `preview`.
        error: why the job ended early, if it did.
        tag: whatever the owner wants to find again.
    """

    table: Table
    latents: Float32
    cond: Conditioning
    uncond: Conditioning
    noise: NoiseSource
    guidance: Guidance = field(default_factory=Guidance)
    row: int = 0
    wants_preview: bool = False
    preview: Float32 | None = None
    error: LatentrtError | None = None
    tag: Any = None
    memory: Float32 = field(init=False)

    def __post_init__(self) -> None:
        self.memory = np.zeros((SLOTS, *self.latents.shape), np.float32)

    @property
    def done(self) -> bool:
        """Whether all rows have run, or the job failed."""
        return self.row >= len(self.table) or self.error is not None

    @property
    def guided(self) -> bool:
        """Whether the next row takes two lanes."""
        return self.guidance.acts(self.row, len(self.table))

    @property
    def view(self) -> Float32:
        """The latents at the scale of the model's own (variance-preserving) ones: what one would look at."""
        rows = self.table.rows
        return self.latents * rows[self.row].c_in if self.row < len(rows) else self.latents


class Denoiser:
    """Owns the UNet's lanes.

    A job's latents do not depend on who shares its batch: every array operation here is one job's own, and the
    network's results for a lane do not depend on the other lanes' contents.

    Args:
        predict: a UNet: (sample, timestep, conditioning) with a leading lane dimension to its output.
        lanes: the most lanes that one network call may have.
    """

    def __init__(self, predict: Predict, lanes: int = 16) -> None:
        if lanes < 2:
            raise RequestError(f"lanes is {lanes}", "2 or more: a job with guidance takes two", "pass lanes=2")
        self.lanes = lanes
        self._predict = predict
        self._jobs: list[Job] = []
        self._stacked: tuple[list[Conditioning], dict[str, Float32]] = ([], {})

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that have lanes, oldest first."""
        return tuple(self._jobs)

    @property
    def free(self) -> int:
        """Lanes that are not promised to any job; a job with guidance is promised two for its whole run."""
        return self.lanes - sum(_promised(job) for job in self._jobs)

    def fits(self, job: Job) -> bool:
        """Whether the job could be admitted now."""
        return _promised(job) <= self.free

    def admit(self, job: Job) -> None:
        """Give a job its lanes.

        Raises:
            RequestError: there are not enough free lanes, or the job has no rows left.
        """
        if not self.fits(job):
            raise RequestError(
                f"{self.free} of {self.lanes} lanes are free", f"{_promised(job)}", "tick until a job is done"
            )
        if job.done or job in self._jobs:
            state = "no rows left" if job.done else "lanes already"
            raise RequestError(f"the job has {state}", "a job that waits for its first row", "make a new job")
        self._jobs.append(job)

    def retire(self, job: Job) -> None:
        """Take a job's lanes away, done or not; a job that has none is left alone."""
        if job in self._jobs:
            self._jobs.remove(job)

    def tick(self) -> list[Job]:
        """Run one row of every job: one network call for each latent shape.

        Returns:
            The jobs that moved; those among them that are done have been retired.
        """
        moved = list(self._jobs)
        for group in _groups(moved):
            self._run(group)
        self._jobs = [job for job in self._jobs if not job.done]
        return moved

    def _run(self, group: list[Job]) -> None:
        guided = [job.guided for job in group]
        rows = [job.table.rows[job.row] for job in group]
        counts = [2 if two else 1 for two in guided]
        scaled = np.stack([row.c_in * job.latents for job, row in zip(group, rows, strict=True)])
        sample = np.repeat(scaled, counts, axis=0)
        timestep = np.repeat(np.array([row.timestep for row in rows], np.float32), counts)
        out = self._predict(sample, timestep, self._conditioning(group, guided))
        lane = 0
        for job, row, two in zip(group, rows, guided, strict=True):
            own = job.guidance.combine(out[lane], out[lane + 1]) if two else out[lane]
            lane += 2 if two else 1
            _advance(job, row, own)

    def _conditioning(self, group: list[Job], guided: list[bool]) -> dict[str, Float32]:
        """Every lane's conditioning, stacked; kept as long as the lanes stay the same."""
        lanes: list[Conditioning] = []
        for job, two in zip(group, guided, strict=True):
            lanes += (job.uncond, job.cond) if two else (job.cond,)
        known, stacked = self._stacked
        if len(lanes) != len(known) or any(a is not b for a, b in zip(lanes, known, strict=True)):
            stacked = {name: np.stack([lane[name] for lane in lanes]) for name in lanes[0]}
            self._stacked = (lanes, stacked)
        return stacked


def _advance(job: Job, row: Row, out: Float32) -> None:
    if job.wants_preview:
        job.preview = preview(row, job.latents, out)
    noise = job.noise.normal(job.latents.shape) if row.c else None
    job.latents = advance(row, job.latents, out, job.memory, noise)
    job.row += 1
    if not np.isfinite(job.latents).all():
        job.error = NetworkError(
            f"the latents are not finite after row {job.row} of {len(job.table)}",
            "finite numbers",
            "check the bundle (latentrt verify), or take a smaller guidance or another solver",
        )


def _promised(job: Job) -> int:
    return 2 if job.guidance.scale > 1 else 1


def _groups(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that can share a network call: those with latents of one shape."""
    groups: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.latents.shape, []).append(job)
    return list(groups.values())
