"""The two threads that use the engine: one ticks, the other encodes and decodes beside the ticks.

On a device with one stream of work the second one is not started: the first does one piece of its work between two
ticks. Pieces for pictures that are cut into tiles are divided: between two tiles there is time for smaller ones, and on
one stream for a tick.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from latentrt.engine import Engine
from latentrt.errors import LatentrtError, NetworkError
from latentrt.run.job import Float32, Job
from latentrt.serve.core import pipeline
from latentrt.serve.core.device import Device
from latentrt.serve.core.errors import Cancelled, as_error
from latentrt.serve.core.handle import Handle, Mark, Slot, Stage, Work
from latentrt.serve.core.rules.movers import Movers
from latentrt.serve.core.rules.turns import Turns
from latentrt.serve.core.scheduler import Scheduler

LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class _Begun:
    """A piece of work that was begun: its latents (height times width), and the seconds spent on others meanwhile."""

    work: Work
    area: int
    others: float = 0.0


class SideWorker:
    """Makes jobs of requests, pictures of latents, and previews.

    Args:
        device: whose turns it takes.

    Attributes:
        meanwhile: called between two tiles: on one stream, a tick.
    """

    def __init__(self, scheduler: Scheduler, engine: Engine, device: Device) -> None:
        self._scheduler, self._engine, self._device = scheduler, engine, device
        self._begun: list[_Begun] = []  # each between two tiles of the one before it
        self.meanwhile: Callable[[], object] = lambda: None

    def run(self) -> None:
        """Work until the scheduler is closed."""
        while self.work(wait=True):
            pass

    def work(self, *, wait: bool = False) -> bool:
        """Do one piece of work, or none where it is over when its turn comes; return whether there was one."""
        if not self._scheduler.has_side_work(wait=wait):
            return False
        with self._device.stages:
            self._piece()
        return True

    def _piece(self, below: float = math.inf) -> int:
        """Do one piece of work, for a picture of fewer latents; return how many it has, 0 where there was none."""
        with self._scheduler.side_work(below) as work:
            if work is None:
                return 0
            self._begun.append(begun := _Begun(work, work.area))
            try:
                self._do(work)
            finally:
                self._begun.pop()
        return begun.area

    def between(self, tile: int) -> None:
        """Do smaller work between two tiles of a picture, as much as costs the same as a tile of so many latents.

        Raises:
            Cancelled: no client waits for the picture any more.
        """
        if not self._begun:  # a self-check's picture
            return
        begun, start, left = self._begun[-1], time.monotonic(), tile
        with self._scheduler.watched("stage", math.inf), self._device.stages.lent():  # waiting for others is no hang
            self.meanwhile()
        while left > 0 and (done := self._piece(begun.area)):
            left -= done
        begun.others += time.monotonic() - start
        if begun.work.over:
            raise Cancelled.of("ended between two tiles")

    def _do(self, work: Work) -> None:
        if work.slot is None:
            self._prepare(work.handle)
        elif work.preview is None:
            self._decode(work.slot)
        else:
            self._preview(work.slot, *work.preview)

    def _prepare(self, handle: Handle) -> None:
        try:
            with self._timed("prepare", handle):
                jobs, unread = pipeline.prepare(self._engine, handle.request)
        except Cancelled:
            return  # it has failed
        except Exception as error:
            if pipeline.is_fault(error):
                self._scheduler.suspect(as_error(error))
            self._scheduler.fail(handle, as_error(error))
        else:
            self._scheduler.prepared(handle, jobs, unread)

    def _decode(self, slot: Slot) -> None:
        """Decode a picture. One that is not finite is no fault: any client could make the server unready with it."""
        job = slot.job
        if job is None:  # over by now
            return
        try:
            with self._timed("decode", slot.handle, slot.index):
                picture = self._engine.picture(job)
        except Cancelled:
            return  # it is over
        except Exception as error:
            if not isinstance(error, NetworkError):
                self._scheduler.suspect(as_error(error))
            self._scheduler.fail(slot.handle, as_error(error))
        else:
            self._scheduler.finish(slot, picture)

    def _preview(self, slot: Slot, number: int, latents: Float32) -> None:
        """Decode a preview. One that cannot be decoded is left out: the picture itself may still succeed."""
        with suppress(LatentrtError):
            with self._timed("preview", slot.handle, slot.index):
                image = self._engine.preview(latents)
            self._scheduler.show(slot, number, image)

    @contextmanager
    def _timed(self, stage: str, handle: Handle, index: int | None = None) -> Iterator[None]:
        start = time.monotonic()
        yield
        end = time.monotonic()
        handle.marks.append(Mark(stage, index, start, end))
        self._scheduler.observer.staged(stage, end - start - self._begun[-1].others)


class Worker:
    """The engine's thread: pictures join and leave between two ticks, and no other thread calls the denoiser.

    Args:
        device: whose turns it takes.
        side: whose work is done between two ticks; None where another thread does it.
    """

    def __init__(self, scheduler: Scheduler, engine: Engine, device: Device, side: SideWorker | None) -> None:
        self._scheduler, self._engine, self._denoiser = scheduler, engine, engine.denoiser
        self._device, self._side = device, side
        self._slots: dict[Job, Slot] = {}  # of the jobs that have lanes
        self._shapes, self._movers = Turns[tuple[int, ...]](), Movers()
        if side is not None:
            side.meanwhile = partial(self._turn, wait=False)

    def run(self) -> None:
        """Take turns until the scheduler is closed."""
        while self._turn():
            if self._side is not None:
                self._side.work()
        self._retire(list(self._slots))

    def _turn(self, *, wait: bool = True) -> bool:
        """Let pictures leave and join, then tick, once there is something to do; return False to end the thread."""
        joining = self._scheduler.next_turn(busy=bool(self._slots) or not wait)
        if joining is None:
            return False
        self._retire([job for job, slot in self._slots.items() if slot.stage is not Stage.RUNNING])
        if self._scheduler.check_due and (not self._slots or self._denoiser.resumable):
            with self._device.steps:
                self._check()
        for slot in joining:
            self._admit(slot)
        if self._slots:
            with self._device.steps:
                self._tick()
        return True

    def _retire(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            del self._slots[job]
            self._denoiser.retire(job)

    def _admit(self, slot: Slot) -> None:
        job = slot.job
        if job is None:  # over by now
            return
        try:
            self._denoiser.admit(job)
        except Exception as error:
            if pipeline.is_fault(error):
                self._scheduler.suspect(as_error(error))
            self._scheduler.fail(slot.handle, as_error(error))
        else:
            self._slots[job] = slot

    def _tick(self) -> None:
        slots = self._next_to_move()
        rows = {job: job.moved for job in slots}
        stopping = {job for job, slot in slots.items() if slot.stops}
        for job, slot in slots.items():
            job.wants_preview = job in stopping or slot.handle.preview_at(job.moved + 1) is not None
        lanes = sum(job.lanes for job in slots)
        start = time.monotonic()
        area = max(math.prod(job.latents.shape[1:]) for job in slots)
        with self._scheduler.watched("step", area):
            try:
                self._denoiser.tick(slots)
            except Exception as error:
                self._rescue(rows, error)
        self._scheduler.ticked(list(slots.values()), lanes, time.monotonic() - start)
        for job, slot in slots.items():
            if job in self._slots and (job.moved > rows[job] or job.done):
                self._hand_over(job, slot, stops=job in stopping and not job.done)

    def _next_to_move(self) -> dict[Job, Slot]:
        """Return the jobs that move in this tick, of one shape. A shape of more clients has more turns."""
        groups: dict[tuple[int, ...], dict[Job, Slot]] = {}
        for job, slot in self._slots.items():
            groups.setdefault(job.latents.shape, {})[job] = slot
        costs = {shape: _cost(shape, group) for shape, group in groups.items()}
        shape = self._shapes.first(costs)
        self._shapes.take(shape, costs)
        group = groups[shape]
        if self._scheduler.facts.fixed_lanes:
            return group
        moving = self._movers.of(list(group.values()), self._scheduler.wanted)
        return {job: slot for job, slot in group.items() if slot in moving}

    def _hand_over(self, job: Job, slot: Slot, *, stops: bool) -> None:
        """Take a job that has moved out if it is done, failed or stops here; pass a preview of it on to the VAE."""
        if stops:
            self._retire([job])
            job.stop()
        elif job.done:
            del self._slots[job]
        if job.error is not None:
            self._scheduler.fail(slot.handle, job.error)
        elif job.done or stops:
            self._scheduler.hand_over(slot)
        elif job.preview is not None and (number := slot.handle.preview_at(job.moved)) is not None:
            self._scheduler.hand_over(slot, (number, job.preview))

    # ---- Faults

    def _rescue(self, rows: dict[Job, int], error: Exception) -> None:
        """Handle a step that raised: the error does not say because of which job.

        Those that did not move are run once more, each alone: where one raises again, its request fails; the others go
        on as before. Where jobs are not resumable the device's memory may hold anything, so all fail.
        """
        LOG.error("a step raised", exc_info=error)
        self._scheduler.suspect(as_error(error))
        for job in [job for job in rows if job.done]:
            self._denoiser.retire(job)
        failed = dict.fromkeys(self._slots, error)
        if self._denoiser.resumable:
            failed = self._one_by_one([job for job, row in rows.items() if job.moved == row])
        for job, raised in failed.items():
            self._scheduler.fail(self._slots[job].handle, as_error(raised))
        self._retire(list(failed))

    def _one_by_one(self, stuck: Sequence[Job]) -> dict[Job, Exception]:
        """Move each of these jobs by a row without the others; return those that raised, and what."""
        seated, failed = self._denoiser.jobs, dict[Job, Exception]()
        for job in seated:
            self._denoiser.retire(job)
        for job in stuck:
            self._denoiser.admit(job)
            try:
                self._denoiser.tick()
            except Exception as error:
                failed[job] = error
            self._denoiser.retire(job)
        for job in seated:
            if job not in failed and not job.done:
                self._denoiser.admit(job)
        return failed

    def _check(self) -> None:
        """Run a self-check, without the jobs that run."""
        for job in self._slots:
            self._denoiser.retire(job)
        failed: LatentrtError | None = None
        try:
            with self._scheduler.watched("self-check"):
                pipeline.check(self._engine)
        except Exception as error:
            LOG.exception("the self-check failed")
            failed = as_error(error)
        self._scheduler.checked(failed)
        for job in self._slots:
            self._denoiser.admit(job)


def _cost(shape: tuple[int, ...], group: Mapping[Job, Slot]) -> float:
    """Return what a tick of these jobs costs each of their clients."""
    owners = {slot.handle.owner for slot in group.values()}
    return math.prod(shape) * sum(job.lanes for job in group) / len(owners)
