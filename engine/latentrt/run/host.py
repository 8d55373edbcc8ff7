"""Lanes on the host: numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.model.predictor import Predictor
from latentrt.run.job import Job
from latentrt.sampling.table import Row, advance, blend, preview

Float32 = NDArray[np.float32]
Inputs = Mapping[str, NDArray[Any]]
Predict = Callable[[Float32, Float32, Inputs], Float32]


class HostLanes:
    """Lanes in numpy. Every array operation here is one job's own, and the network's results for a lane do not depend
    on the other lanes' contents.

    Args:
        predict: a `Predictor`: (sample, timestep, inputs) with a leading lane axis to its output.
        count: the most lanes that one call may have.
    """

    resumable = True

    def __init__(self, predict: Predict, count: int = 16) -> None:
        self.count = count
        self._predict = predict
        self._stacked: dict[bool, tuple[list[Inputs], dict[str, NDArray[Any]]]] = {}  # by depth

    def admit(self, job: Job) -> None:
        """Do nothing: a job brings its arrays."""

    def retire(self, job: Job) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def advance(self, jobs: list[Job]) -> None:
        """Call the predictor once over the lanes that these rows need, then apply each job's row."""
        guided = [job.guided for job in jobs]
        rows = [job.table.rows[job.row] for job in jobs]
        counts = [2 if two else 1 for two in guided]
        scaled = np.stack([row.c_in * job.latents for job, row in zip(jobs, rows, strict=True)])
        sample = np.repeat(scaled, counts, axis=0)
        timestep = np.repeat(np.array([row.timestep for row in rows], np.float32), counts)
        out = self._call(jobs, counts, sample, timestep, {**self._inputs(jobs, guided), **_scalars(jobs, counts)})
        lane = 0
        for job, row, two in zip(jobs, rows, guided, strict=True):
            own = job.guidance.combine(out[lane], out[lane + 1]) if two else out[lane]
            lane += 2 if two else 1
            _advance(job, row, own)

    def _call(self, jobs: list[Job], counts: list[int], sample: Float32, timestep: Float32, inputs: Inputs) -> Float32:
        """Call the predictor, and keep deep features for those jobs whose later rows use them again."""
        if jobs[0].shallow:
            deep = np.concatenate([_deep_of(job, count) for job, count in zip(jobs, counts, strict=True)])
            return cast(Predictor, self._predict).shallow(sample, timestep, inputs, deep)
        if not any(job.table.shallow for job in jobs):
            return self._predict(sample, timestep, inputs)
        out, deep = cast(Predictor, self._predict).with_deep(sample, timestep, inputs)
        for job, own in zip(jobs, np.split(deep, np.cumsum(counts)[:-1]), strict=True):
            job.deep = own.copy() if job.table.shallow else None
        return out

    def _inputs(self, jobs: list[Job], guided: list[bool]) -> dict[str, NDArray[Any]]:
        """Return every lane's inputs, stacked; kept as long as the lanes stay the same."""
        lanes: list[Inputs] = []
        for job, two in zip(jobs, guided, strict=True):
            lanes += (job.uncond, job.cond) if two else (job.cond,)
        known, stacked = self._stacked.get(jobs[0].shallow, ([], {}))
        if len(lanes) != len(known) or any(a is not b for a, b in zip(lanes, known, strict=True)):
            stacked = {name: np.stack([lane[name] for lane in lanes]) for name in lanes[0]}
            self._stacked[jobs[0].shallow] = (lanes, stacked)
        return stacked


def _deep_of(job: Job, lanes: int) -> Float32:
    """Return the job's deep features for so many lanes: the one with the prompt is the last."""
    assert job.deep is not None, "a job's first row is full"
    return job.deep[-lanes:]


def _scalars(jobs: list[Job], counts: list[int]) -> dict[str, Float32]:
    return {
        name: np.repeat(np.array([job.table.scalars[name][job.row] for job in jobs], np.float32), counts)
        for name in jobs[0].shapes.scalars
    }


def _advance(job: Job, row: Row, out: Float32) -> None:
    if job.wants_preview:
        job.preview = preview(row, job.latents, out)
    noise = job.noise.normal(job.latents.shape) if row.c else None
    job.latents = advance(row, job.latents, out, job.memory, noise)
    job.row += 1
    if job.kept is not None:
        kept, level = job.kept, job.table.known[job.row]
        job.latents = blend(level, job.latents, kept.mask, kept.clean, kept.noise)
    if not np.isfinite(job.latents).all():
        job.fail(job.row)
