"""Lanes on a GPU: jobs live in arenas, one for each kind of shapes, and a tick is one CUDA graph."""

from __future__ import annotations

from collections import deque
from typing import Any

from latentrt.model.predictor import Predictor
from latentrt.run.gpu.arena import Arena, Depth, check_fresh
from latentrt.run.job import Job, Shapes
from latentrt.run.pool import Pool
from latentrt.sampling.noise import TorchCudaNoise

ROOMS_KEPT = 4  # kinds of shapes whose memory is kept while no job uses it
TICKS_AHEAD = 2  # how far the host may run ahead of the device


class DeviceLanes:
    """The lanes of a predictor on a GPU (`lanes.Lanes`).

    A job's `latents` are those it was admitted with until it is done, or after every row where it wants previews; only
    then the host waits for the device.

    Args:
        predictor: over networks on the device.
        count: lanes of every call; idle ones are computed too, and ignored.
        capture: whether a tick is captured once as a CUDA graph and launched as a whole, or queued call by call.
    """

    resumable = False

    def __init__(self, predictor: Predictor, count: int, *, capture: bool = True) -> None:
        self.count = count
        self._predictor, self._capture = predictor, capture
        self._rooms: Pool[Shapes, _Room] = Pool(ROOMS_KEPT, lambda room: bool(room.places))

    def admit(self, job: Job) -> None:
        """Copy the job to the device.

        Raises:
            RequestError: it has begun elsewhere, or has too many rows.
            DeviceMemoryError: there is not enough memory for its shapes.
        """
        check_fresh(job)
        self._rooms(job.shapes, lambda: self._room(job.shapes)).admit(job)

    def retire(self, job: Job) -> None:
        """Make its slot idle."""
        self._rooms[job.shapes].retire(job)

    def advance(self, jobs: list[Job]) -> None:
        """Queue one row of these jobs, of the same shapes and depth; wait for those that are done or want previews."""
        self._rooms[jobs[0].shapes].advance(jobs)

    def close(self) -> None:
        """Free the memory."""
        self._rooms.close()

    def _room(self, shapes: Shapes) -> _Room:
        return _Room(Arena(shapes.predictor or self._predictor, shapes, self.count, capture=self._capture))


class _Room:
    """An arena, and the slots and lanes of its jobs."""

    def __init__(self, arena: Arena) -> None:
        self._arena, self._gpu = arena, arena.gpu
        self._marks: deque[Any] = deque()
        self._free_lanes = [list(part) for part in arena.parts]
        self._free_slots = list(range(arena.slots))
        self.places: dict[Job, tuple[int, list[int]]] = {}
        self._noises: dict[Job, int] = {}
        self._previewed: set[Job] = set()

    def admit(self, job: Job) -> None:
        self._arena.make_room_for([job])
        slot = self._free_slots.pop(0)
        lanes = [self._free_lanes[number % len(self._free_lanes)].pop(0) for number in range(job.guidance.lanes)]
        self.places[job] = slot, lanes
        self._noises[job] = 0
        for lane, inputs in zip(lanes, job.sides, strict=True):
            self._arena.fill(lane, inputs)
        self._arena.place(slot, job, lanes)
        if job.wants_preview:
            self._previewed.add(job)
        self._arena.begin(slot, 1)

    def retire(self, job: Job) -> None:
        slot, lanes = self.places.pop(job)
        if isinstance(job.noise, TorchCudaNoise):  # the device drew them
            noises = sum(row.c != 0 for row in job.table.rows[: job.row]) + (job.start != 0)
            job.noise.skip(job.latents.size, noises)
        self._noises.pop(job)
        self._previewed.discard(job)
        self._arena.empty(slot)
        for lane in lanes:
            self._arena.clear(lane)
        self._free_slots = sorted([*self._free_slots, slot])
        for part, free in zip(self._arena.parts, self._free_lanes, strict=True):
            free[:] = sorted([*free, *(lane for lane in lanes if lane in part)])

    def advance(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._prepare(job)
        self._arena.take_turns([self.places[job][0] for job in jobs])
        self._tick(Depth.of(jobs), rescaled=any(job.guidance.rescale for job in jobs))
        for job in jobs:
            job.row += 1
            if job.ended or job.wants_preview:
                self._fetch(job)

    def _prepare(self, job: Job) -> None:
        slot, lanes = self.places[job]
        if job.wants_preview != (job in self._previewed):
            (self._previewed.add if job.wants_preview else self._previewed.remove)(job)
            self._arena.seat(slot, job, lanes)
        if job.table.rows[job.row].c and not isinstance(job.noise, TorchCudaNoise):
            self._arena.add_noise(slot, self._noises[job], job.noise.normal(job.latents.shape))
            self._noises[job] += 1

    def _tick(self, depth: Depth, *, rescaled: bool) -> None:
        """Queue a tick once fewer than TICKS_AHEAD earlier ones are unfinished, so that cancelling stays prompt."""
        while len(self._marks) >= TICKS_AHEAD:
            self._gpu.wait_for(self._marks.popleft())
        arena = self._arena
        key = (rescaled, depth)
        arena.launch(key, lambda: arena.row(rescaled=rescaled, depth=depth), lambda: arena.call_network(depth))
        self._marks.append(self._gpu.mark())

    def _fetch(self, job: Job) -> None:
        slot, _ = self.places[job]
        state = self._arena.state
        job.latents = self._gpu.download(state.x.part(slot))[0]
        if job.wants_preview:
            assert state.preview is not None
            job.preview = self._gpu.download(state.preview.part(slot))[0]
        bad = int(self._gpu.download(state.progress.part(slot))["bad"][0])
        if bad:
            job.fail(bad)

    def close(self) -> None:
        self._arena.close()
