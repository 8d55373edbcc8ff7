"""Lanes on the host: numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.model.predictor import DEEP, Predictor
from latentrt.run.controlled import acts, add_residuals
from latentrt.run.job import Job
from latentrt.sampling.table import Row, advance, blend, preview

Float32 = NDArray[np.float32]
Inputs = Mapping[str, NDArray[Any]]
Predict = Callable[[Float32, Float32, Inputs], Float32]
Predicted = tuple[Float32, Float32 | None]
Most = Callable[[tuple[int, ...]], int]  # the shape of latents to the most lanes of one call


class HostLanes:
    """Lanes in numpy. Every array operation here is one job's own, and the network's results for a lane do not depend
    on the other lanes' contents.

    Args:
        predict: a `Predictor`: (sample, timestep, inputs) with a leading lane axis to its output. A job may bring its
            own.
        count: the most lanes that one call may have.

    Attributes:
        most: the most lanes of a call by the shape of its latents, where that is less: more are computed in several.
    """

    resumable = True
    most: Most | None = None

    def __init__(self, predict: Predict, count: int = 16) -> None:
        self.count = count
        self._predict = predict
        self._stacked: dict[Hashable, tuple[list[Inputs], dict[str, NDArray[Any]]]] = {}  # by call of a tick

    def admit(self, job: Job) -> None:
        """Do nothing: a job brings its arrays."""

    def retire(self, job: Job) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def advance(self, jobs: list[Job]) -> None:
        """Call the predictor over the lanes that these rows need, then apply each job's row.

        That is one call; several where there are more lanes than one may have, and one for each length of text where
        the lanes of a job differ in it.
        """
        rows = [job.table.rows[job.row] for job in jobs]
        counts = [job.lanes for job in jobs]
        sides = [job.sides[-count:] for job, count in zip(jobs, counts, strict=True)]
        scaled = np.stack([row.c_in * job.latents for job, row in zip(jobs, rows, strict=True)])
        fed = {
            "sample": np.repeat(scaled, counts, axis=0),
            "timestep": np.repeat(np.array([row.timestep for row in rows], np.float32), counts),
            **_scalars(jobs, counts),
        }
        if jobs[0].shallow:
            fed[DEEP] = np.concatenate([_deep_of(job, count) for job, count in zip(jobs, counts, strict=True)])
        predict = jobs[0].predictor or self._predict
        if acts(jobs):
            residuals = cast(Predictor, predict).no_residuals(fed["sample"])
            add_residuals(jobs, counts, fed["sample"], fed["timestep"], residuals, self._inputs)
            fed |= residuals
        keeps = any(job.table.shallow for job in jobs) and not jobs[0].shallow
        out, deep = self._predicted(predict, [side for each in sides for side in each], fed, keeps=keeps)
        ends = np.cumsum(counts).tolist()
        for job, row, count, end in zip(jobs, rows, counts, ends, strict=True):
            if deep is not None:
                job.deep = deep[end - count : end].copy() if job.table.shallow else None
            own = out[end - count : end]
            _advance(job, row, job.guidance.combine(*own) if count > 1 else own[0])

    def _predicted(self, predict: Predict, lanes: list[Inputs], fed: Inputs, *, keeps: bool) -> Predicted:
        """Return the predictor's outputs for all lanes, and where it `keeps` them its deep features."""
        most = len(lanes) if self.most is None else max(1, self.most(fed["sample"].shape[1:]))
        parts = [part[first : first + most] for part in _alike(lanes) for first in range(0, len(part), most)]
        if len(parts) == 1:
            return self._call(predict, 0, lanes, fed, keeps=keeps)
        calls = []
        for number, part in enumerate(parts):
            own = {name: array[part] for name, array in fed.items()}
            calls.append(self._call(predict, number, [lanes[lane] for lane in part], own, keeps=keeps))
        order = np.argsort(np.concatenate(parts))
        outs, deeps = zip(*calls, strict=True)
        return np.concatenate(outs)[order], np.concatenate(deeps)[order] if keeps else None

    def _call(self, predict: Predict, number: int, lanes: list[Inputs], fed: Inputs, *, keeps: bool) -> Predicted:
        inputs = {**self._inputs((number, DEEP in fed), lanes), **fed}
        sample, timestep, deep = inputs.pop("sample"), inputs.pop("timestep"), inputs.pop(DEEP, None)
        if deep is not None:
            return cast(Predictor, predict).shallow(sample, timestep, inputs, deep), None
        if keeps:
            return cast(Predictor, predict).with_deep(sample, timestep, inputs)
        return predict(sample, timestep, inputs), None

    def _inputs(self, call: Hashable, lanes: list[Inputs]) -> dict[str, NDArray[Any]]:
        """Return every lane's inputs, stacked; kept as long as the lanes of a call stay the same."""
        known, stacked = self._stacked.get(call, ([], {}))
        if len(lanes) != len(known) or any(a is not b for a, b in zip(lanes, known, strict=True)):
            stacked = {name: np.stack([lane[name] for lane in lanes]) for name in lanes[0]}
            self._stacked[call] = (lanes, stacked)
        return stacked


def _alike(lanes: list[Inputs]) -> list[list[int]]:
    """Return the numbers of the lanes, those together whose inputs have the same shapes."""
    parts: dict[tuple[Any, ...], list[int]] = {}
    for number, lane in enumerate(lanes):
        parts.setdefault(tuple(array.shape for array in lane.values()), []).append(number)
    return list(parts.values())


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
