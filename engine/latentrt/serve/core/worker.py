"""The engine's thread: pictures join and leave between ticks, and nothing else ever calls the denoiser."""

from __future__ import annotations

import logging
import time
from collections import Counter

from latentrt.engine import Engine
from latentrt.errors import LatentrtError
from latentrt.run.job import Job
from latentrt.serve.core import stages
from latentrt.serve.core.curve import Curve, Shape
from latentrt.serve.core.desk import Desk, as_error
from latentrt.serve.core.queue import Part, sooner
from latentrt.serve.core.studio import Studio
from latentrt.serve.core.ticket import Failed, Progress, Started

LOG = logging.getLogger(__name__)


class Worker:
    """One turn after the other: who left gives lanes back, who waits takes them, all move by a row.

    Args:
        caps: the measured curve that says how many lanes pay; it does not change.
        curve: what learns from every tick.
        run_timeout: seconds that a picture may take once it has lanes.
        studio: whose pieces are done between ticks; None where another thread does them.
    """

    def __init__(
        self, desk: Desk, engine: Engine, caps: Curve, curve: Curve, run_timeout: float, studio: Studio | None
    ) -> None:
        self._desk, self._engine, self._denoiser = desk, engine, engine.denoiser
        self._caps, self._curve = caps, curve
        self._run_timeout, self._studio = run_timeout, studio
        self._seated: dict[Job, Part] = {}

    def run(self) -> None:
        """Turn until the desk is closed."""
        while self._turn():
            pass

    def _turn(self) -> bool:
        """One turn, as soon as there is something to do; False where the desk is closed."""
        with self._desk.changed:
            while not (chosen := self._choose()) and not self._must_go_on():
                self._desk.changed.wait(self._desk.until_check())
            for part in chosen:
                self._desk.queue.discard(part)
                self._desk.running[part] = None
        self._leave()
        if self._desk.closed:
            return False
        if self._check_due() and self._may_check():
            self._check()
        for part in chosen:
            self._admit(part)
        if self._seated:
            self._tick()
        if self._studio is not None:
            self._studio.work()
        return True

    def _must_go_on(self) -> bool:
        desk, between = self._desk, self._studio
        return bool(desk.closed or self._seated or self._check_due() or (between is not None and between.waits))

    def _check_due(self) -> bool:
        return self._desk.until_check() == 0

    # ---- Joining and leaving

    def _choose(self) -> list[Part]:
        """Who joins now. Nobody while the engine is not trusted, or while the VAE lags by as much as all lanes make."""
        desk, lanes = self._desk, self._denoiser.lanes
        if not desk.trusted or desk.closed or len(desk.denoised) >= lanes:
            return []
        busy: Counter[Shape] = Counter()
        for part in self._seated.values():
            if not part.ended:
                busy[part.shape] += part.lanes
        return desk.queue.next(lanes, busy, lambda shape: self._caps.cap(shape, lanes))

    def _leave(self) -> None:
        """Take the lanes of pictures that are over for some other reason than their last row."""
        for job, part in list(self._seated.items()):
            if part.ended:
                del self._seated[job]
                self._denoiser.retire(job)

    def _admit(self, part: Part) -> None:
        now = time.monotonic()
        with self._desk.changed:
            if part.ended or part.job is None:
                return
            part.admitted = now
            part.limit = sooner(now + self._run_timeout, part.ticket.order.deadline)
            self._desk.changed.notify_all()  # the clock looks at limits
        try:
            self._denoiser.admit(part.job)
        except Exception as error:
            if stages.is_fault(error):
                self._desk.suspect(as_error(error))
            self._desk.end(part, Failed(part.index, as_error(error)))
            return
        self._seated[part.job] = part
        self._desk.observer.admitted(now - part.accepted)

    # ---- A tick

    def _tick(self) -> None:
        jobs = list(self._seated)
        for job, part in self._seated.items():
            job.wants_preview = job.row + 1 in part.previews
        lanes = {job: 2 if job.guided else 1 for job in jobs}
        rows = {job: job.row for job in jobs}
        start = time.monotonic()
        with self._desk.doing("step"):
            try:
                self._denoiser.tick()
            except Exception as error:
                self._rescue(rows, error)
        seconds = time.monotonic() - start
        self._desk.observer.ticked(seconds, sum(lanes.values()), len(jobs))
        self._learn({self._seated[job].shape for job in jobs if job in self._seated}, sum(lanes.values()), seconds)
        for job in jobs:
            if job in self._seated and (job.row > rows[job] or job.done):
                self._moved(job, self._seated[job])

    def _learn(self, shapes: set[Shape], lanes: int, seconds: float) -> None:
        """A good tick of one shape is a point of the curve. On a GPU idle lanes are computed too."""
        if len(shapes) == 1 and self._desk.fault is None:
            with self._desk.changed:
                own = lanes if self._engine.backend.gpu is None else self._denoiser.lanes
                self._curve.learn(shapes.pop(), own, seconds)

    def _moved(self, job: Job, part: Part) -> None:
        if not part.ticket.begun:
            part.ticket.begun = True
            self._desk.tell(part, Started())
        self._desk.tell(part, Progress(part.index, job.row, part.rows))
        if job.done:
            del self._seated[job]
        if job.error is not None:
            self._desk.end(part, Failed(part.index, job.error))
        elif job.done:
            self._hand_over(part)
        elif job.wants_preview and job.preview is not None:
            with self._desk.changed:
                if not part.ended:
                    self._desk.sketches[part] = (part.previews[job.row], job.preview)
                    self._desk.changed.notify_all()

    def _hand_over(self, part: Part) -> None:
        with self._desk.changed:
            self._desk.sketches.pop(part, None)  # the picture itself is next
            if not part.ended:
                self._desk.denoised.append(part)
                self._desk.changed.notify_all()

    # ---- Faults

    def _rescue(self, rows: dict[Job, int], error: Exception) -> None:
        """A step raised, and nobody knows over which job.

        On a CPU those that did not move are run once more, each alone: who raises again fails, the others go on as if
        nothing had been. On a GPU what raised may have left anything in the device's memory, so all fail.
        """
        LOG.error("a step raised", exc_info=error)
        self._desk.suspect(as_error(error))
        for job in [job for job in rows if job.done]:
            self._denoiser.retire(job)
        stuck = [job for job, row in rows.items() if job.row == row]
        lost = self._engine.backend.gpu is not None
        failed = dict.fromkeys(self._seated, error) if lost else self._one_by_one(stuck)
        for job, raised in failed.items():
            part = self._seated.pop(job)
            self._desk.end(part, Failed(part.index, as_error(raised)))
            self._denoiser.retire(job)

    def _one_by_one(self, stuck: list[Job]) -> dict[Job, Exception]:
        """Move each of these jobs by a row without the others; who raised, and what."""
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

    # ---- Self-checks

    def _may_check(self) -> bool:
        """On a CPU running jobs can stand aside for a check; on a GPU they would lose what the device has of them."""
        return not self._seated or self._engine.backend.gpu is None

    def _check(self) -> None:
        for job in self._denoiser.jobs:
            self._denoiser.retire(job)
        with self._desk.changed:
            asked, self._desk.asked = self._desk.asked, []
        error: LatentrtError | None = None
        try:
            with self._desk.doing("self-check"):
                stages.check(self._engine)
        except Exception as raised:
            LOG.exception("the self-check failed")
            error = as_error(raised)
        self._desk.was_checked(error, asked)
        self._leave()
        for job in self._seated:
            self._denoiser.admit(job)
