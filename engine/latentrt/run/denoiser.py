"""The one loop: jobs take lanes, a tick calls the network once over all lanes and advances every job by one row.

This runs for one picture and for a busy server, on the CPU and on a GPU; only who admits jobs and what the lanes are
made of differ.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from latentrt.errors import LatentrtError, RequestError
from latentrt.run.host import HostLanes, Most
from latentrt.run.job import Job, Shapes
from latentrt.run.lanes import Lanes

OnTick = Callable[[Job], None]


class Denoiser:
    """Owns the predictor's lanes and assigns them to jobs. One thread at a time may use it."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._jobs: list[Job] = []

    @property
    def lanes(self) -> int:
        """The most lanes that one network call may have."""
        return self._lanes.count

    @property
    def resumable(self) -> bool:
        """Whether a job that was retired before it was done can be admitted again and go on."""
        return self._lanes.resumable

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that have lanes, oldest first."""
        return tuple(self._jobs)

    @property
    def free(self) -> int:
        """Lanes that are not reserved for any job; a job with guidance has two reserved for its whole run."""
        return self.lanes - sum(job.most_lanes for job in self._jobs)

    def check_idle(self) -> None:
        """Refuse while jobs have lanes. Raise RequestError."""
        if self._jobs:
            raise RequestError(
                f"{len(self._jobs)} pictures are being drawn", needed="none", fix="wait until they are done"
            )

    def limit_calls(self, most: Most) -> None:
        """Let no call on the host have more lanes of a shape than this: see `HostLanes.most`."""
        if isinstance(self._lanes, HostLanes):
            self._lanes.most = most

    def fits(self, job: Job) -> bool:
        """Return whether the job could be admitted now."""
        return job.most_lanes <= self.free

    def admit(self, job: Job) -> None:
        """Give a job its lanes.

        Raises:
            RequestError: there are not enough free lanes, or the job has no rows left.
        """
        if not self.fits(job):
            fix = "tick until a job is done" if self._jobs else f"load the engine with lanes={job.most_lanes}"
            raise RequestError(f"{self.free} of {self.lanes} lanes are free", needed=f"{job.most_lanes}", fix=fix)
        if job.done or job in self._jobs:
            state = "no rows left" if job.done else "lanes already"
            raise RequestError(f"the job has {state}", needed="a job that waits for its first row")
        self._lanes.admit(job)
        self._jobs.append(job)

    def retire(self, job: Job) -> None:
        """Take a job's lanes away, done or not; do nothing where it has none."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._lanes.retire(job)

    def tick(self, chosen: Collection[Job] | None = None) -> list[Job]:
        """Run one row of every job: one network call for the jobs of the same shapes and depth.

        Args:
            chosen: the jobs that move; None: all that have lanes. Jobs of the same shapes move together.

        Returns:
            The jobs that moved; those among them that are done have been retired.
        """
        moved = [job for job in self._jobs if chosen is None or job in chosen]
        groups: dict[tuple[Shapes, bool], list[Job]] = {}
        for job in moved:
            groups.setdefault((job.shapes, job.shallow), []).append(job)
        for group in groups.values():
            self._lanes.advance(group)
        for job in moved:
            if job.ended and not job.done:
                self._go_on(job)
            if job.done:
                self.retire(job)
        return moved

    def _go_on(self, job: Job) -> None:
        """Begin a job's next stage; where its lanes cannot be had, the job fails."""
        self._lanes.retire(job)
        job.go_on()
        try:
            self._lanes.admit(job)
        except LatentrtError as error:
            self._jobs.remove(job)
            job.error = error

    def run(self, jobs: Iterable[Job], on_tick: OnTick | None = None) -> None:
        """Denoise jobs to their end, as many at once as there are lanes; jobs of other callers move with them.

        Args:
            jobs: not admitted yet.
            on_tick: called after every row of each of these jobs. It may cancel one by `retire`, or end the run by
                raising.

        Raises:
            NetworkError: a job's latents are no longer finite; the others are given up too.
        """
        waiting = list(jobs)
        mine = set(waiting)
        try:
            while waiting or any(job in mine for job in self._jobs):
                while waiting and (self.fits(waiting[0]) or not self._jobs):
                    self.admit(waiting.pop(0))
                for job in self.tick():
                    if job in mine:
                        if on_tick is not None:
                            on_tick(job)
                        if job.error is not None:
                            raise job.error
        finally:
            for job in mine:
                self.retire(job)
