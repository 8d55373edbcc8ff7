"""The one loop: jobs take lanes, a tick calls the network once over all lanes and advances every job by one row.

Whether one picture is made or a server is busy, on the CPU or on a GPU, this is what runs; only who admits jobs and
what the lanes are made of differ.
"""

from __future__ import annotations

from latentrt.errors import RequestError
from latentrt.run.host import Lanes
from latentrt.run.job import Job


class Denoiser:
    """Owns the UNet's lanes and says who has them."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._jobs: list[Job] = []

    @property
    def lanes(self) -> int:
        """The most lanes that one network call may have."""
        return self._lanes.count

    @property
    def jobs(self) -> tuple[Job, ...]:
        """The jobs that have lanes, oldest first."""
        return tuple(self._jobs)

    @property
    def free(self) -> int:
        """Lanes that are not promised to any job; a job with guidance is promised two for its whole run."""
        return self.lanes - sum(job.most_lanes for job in self._jobs)

    def fits(self, job: Job) -> bool:
        """Whether the job could be admitted now."""
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
            raise RequestError(
                f"the job has {state}", needed="a job that waits for its first row", fix="make a new job"
            )
        self._lanes.admit(job)
        self._jobs.append(job)

    def retire(self, job: Job) -> None:
        """Take a job's lanes away, done or not; a job that has none is left alone."""
        if job in self._jobs:
            self._jobs.remove(job)
            self._lanes.retire(job)

    def tick(self) -> list[Job]:
        """Run one row of every job: one network call for each latent shape.

        Returns:
            The jobs that moved; those among them that are done have been retired.
        """
        moved = list(self._jobs)
        for group in _groups(moved):
            self._lanes.advance(group)
        for job in moved:
            if job.done:
                self.retire(job)
        return moved


def _groups(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that can share a network call: those with latents of one shape."""
    groups: dict[tuple[int, ...], list[Job]] = {}
    for job in jobs:
        groups.setdefault(job.latents.shape, []).append(job)
    return list(groups.values())
