"""Background jobs: requests for pictures whose clients hold no connection, and their results for a while."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request as HttpRequest
from starlette.types import Scope

from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.handle import Handle
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http.background.schema import JobStatus, Progress, status_of
from latentrt.serve.http.errors import Answer, Problem, answer_to
from latentrt.serve.http.generation import LOOK
from latentrt.serve.http.guard.record import Record
from latentrt.serve.http.openai.answers import Drawn, Style
from latentrt.serve.process.config import MIB, Settings
from latentrt.serve.process.logs import logger
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.process.webhooks.hosts import Target
from latentrt.serve.process.webhooks.sender import Webhooks

PART = 4  # of all that is kept, one client may have one in so many
LATE = 0.05  # seconds: a timer of the event loop may be a little early
LAST_RESULTS = 10.0  # seconds that clients have for what was finished while the server ends


@dataclass(slots=True, eq=False)
class Job:
    """A request for pictures whose client holds no connection.

    Attributes:
        owner: its key's name, or without keys its client's address.
        model: its name for clients.
        style: how its pictures are answered.
        scheduler, handle: of its pictures; no handle once it is over: it has arrays.
        facts: what the log says of it.
        scope: of the request that ordered it.
        target: of its webhook.
        created, ended: Unix seconds.
        limit: the `time.monotonic()` until which it is kept; infinity while it is not over.
        progress: as it was at the end.
        drawn: its pictures, where it ended well.
        failure: the answer to the error that it ended in.
        task: does all that follows its order.
        read: whether its result has been fetched.
    """

    owner: str
    model: str
    style: Style
    scheduler: Scheduler
    handle: Handle | None
    facts: dict[str, Any]
    scope: Scope
    target: Target | None
    id: str = field(init=False, default_factory=lambda: f"job_{secrets.token_hex(16)}")
    created: float = field(init=False, default_factory=time.time)
    ended: float | None = field(init=False, default=None)
    limit: float = field(init=False, default=math.inf)
    progress: Progress | None = field(init=False, default=None)
    drawn: Sequence[Drawn] = field(init=False, default=())
    failure: Answer | None = field(init=False, default=None)
    task: asyncio.Task[None] | None = field(init=False, default=None)
    read: bool = field(init=False, default=False)

    @property
    def bytes(self) -> int:
        """What its pictures take."""
        return sum(len(one.file) for one in self.drawn)


class Jobs:
    """All jobs of a server; the event loop's thread alone calls this.

    Those that are over are kept for a time and within bounds: for want of room the first to end is the first to go.

    Args:
        settings: the time, the bounds, and where webhooks may go.
        metrics, record: are told of what ends.

    Attributes:
        webhooks: tells receivers of jobs that are over.
    """

    def __init__(self, settings: Settings, metrics: Metrics, record: Record) -> None:
        self._keep, self._count = settings.keep_results, settings.max_results
        self._bytes = settings.results_memory * MIB
        self._metrics, self._record = metrics, record
        self._open: dict[str, Job] = {}
        self._over: dict[str, Job] = {}  # in the order in which they ended
        hosts = settings.hosts()
        self.webhooks = Webhooks(hosts, settings.signing_secrets(), lasting=self._keep, told=metrics.sent)
        metrics.gauge("background_results", "Jobs that are over and kept.", lambda: float(len(self._over)))
        metrics.gauge("background_results_bytes", "Bytes of their pictures.", lambda: float(self._held()))

    # ---- What routes do

    def begin(self, job: Job, begun: AsyncExitStack, drawing: Callable[[], Awaitable[Sequence[Drawn]]]) -> None:
        """Let a job go on without its client.

        Args:
            begun: releases its places.
            drawing: waits for its pictures.
        """
        self._open[job.id] = job
        job.facts["job"] = job.id
        job.task = asyncio.get_running_loop().create_task(self._run(job, begun, drawing))

    def of(self, id: str, owner: str) -> Job:
        """Return a client's job.

        Raises:
            Problem: 404 not_found: there is none, or it is another client's.
        """
        self._sweep()
        job = self._open.get(id) or self._over.get(id)
        if job is None or job.owner != owner:
            raise Problem(
                f"there is no job {id[:64]!r} of yours, or it has expired",
                needed=f"one that runs, or ended less than {self._keep:g} s ago",
                fix="/v1/images/jobs lists them",
                status=404,
                code="not_found",
            )
        return job

    def own(self, owner: str) -> list[Job]:
        """Return all jobs of a client, the newest first."""
        self._sweep()
        found = [job for job in (*self._open.values(), *self._over.values()) if job.owner == owner]
        return sorted(found, key=lambda job: job.created, reverse=True)

    def status(self, job: Job) -> JobStatus:
        """Return what a client is told of its job."""
        progress = Progress.of(job.handle) if job.handle is not None else job.progress
        assert progress is not None
        return status_of(job, progress, None if job.ended is None else job.ended + self._keep)

    async def cancel(self, job: Job) -> None:
        """Cancel a job, and wait until it is over: it may have been done just before."""
        if job.handle is not None and job.task is not None:
            job.scheduler.cancel(job.handle)
            await asyncio.wait([job.task])

    def forget(self, job: Job) -> None:
        """Drop a job that is over."""
        self._drop(job, "deleted")

    async def drained(self, begun: float, seconds: float) -> bool:
        """Wait until all jobs are over, their webhooks sent, and the results of those that ended meanwhile fetched, for
        which clients have LAST_RESULTS. Return whether all jobs are over.

        Args:
            begun: the `time.monotonic()` at which the server's end began.
            seconds: of that end, at most.
        """
        end = begun + seconds
        tasks = [job.task for job in self._open.values() if job.task is not None]
        if tasks:
            await asyncio.wait(tasks, timeout=end - time.monotonic())
        await self.webhooks.finish(end - time.monotonic())
        while (now := time.monotonic()) < end and any(self._unread(max(begun, now - LAST_RESULTS))):
            await asyncio.sleep(LOOK)
        return not self._open

    def _unread(self, since: float) -> Iterator[Job]:
        """Yield jobs that ended well since a `time.monotonic()`, and whose results nobody has fetched."""
        return (job for job in self._over.values() if job.drawn and not job.read and job.limit - self._keep >= since)

    # ---- From begin to end

    async def _run(self, job: Job, begun: AsyncExitStack, drawing: Callable[[], Awaitable[Sequence[Drawn]]]) -> None:
        try:
            async with begun:
                job.drawn = await drawing()
            self._check_room(job)
        except asyncio.CancelledError:  # the process ends
            self._end(job, Cancelled.of("cancelled"))
            raise
        except Exception as error:
            self._end(job, error)
        else:
            self._end(job, None)
        if job.target is not None:
            status = self.status(job)
            self.webhooks.send(job.owner, job.target, f"image.job.{status.status}", status.model_dump(mode="json"))

    def _check_room(self, job: Job) -> None:
        most = self._bytes // PART
        if job.bytes > most:
            found, needed = f"the pictures take {job.bytes} bytes", f"at most {most}, which is what a client may keep"
            fix = "ask for fewer pictures, or for jpeg or webp"
            raise Problem(found, needed, fix, status=400, code="result_too_large")

    def _end(self, job: Job, error: Exception | None) -> None:
        assert job.handle is not None
        job.ended, job.progress, job.handle = time.time(), Progress.of(job.handle), None
        job.limit = time.monotonic() + self._keep
        if error is not None:
            job.drawn, job.failure = (), answer_to(error)
            if job.failure.status == 500:
                logger().error("a job failed", id=job.facts["id"], job=job.id, exc_info=error)
        self._over[job.id] = self._open.pop(job.id)
        self._record.ended_job(job.scope, "completed" if job.failure is None else job.failure.code, job.facts)
        job.facts, job.scope = {}, {}
        self._make_room(job.owner)
        asyncio.get_running_loop().call_later(self._keep + LATE, self._sweep)

    # ---- What is kept

    def _held(self, owner: str | None = None) -> int:
        return sum(job.bytes for job in self._kept(owner))

    def _kept(self, owner: str | None) -> list[Job]:
        return [job for job in self._over.values() if owner in (None, job.owner)]

    def _make_room(self, owner: str) -> None:
        """Drop what is beyond the bounds of a client, then of all: the first to end first."""
        for whose, part in ((owner, PART), (None, 1)):
            while (kept := self._kept(whose)) and (
                len(kept) > max(1, self._count // part) or self._held(whose) > self._bytes // part
            ):
                self._drop(kept[0], "room")

    def _sweep(self) -> None:
        """Drop what has been kept for its time."""
        now = time.monotonic()
        for job in [job for job in self._over.values() if job.limit <= now]:
            self._drop(job, "expired")

    def _drop(self, job: Job, reason: str) -> None:
        with suppress(KeyError):
            del self._over[job.id]
            self._metrics.forgot(reason)


def jobs_of(http: HttpRequest) -> Jobs:
    """Return the jobs of the server that answers a request."""
    jobs = http.app.state.jobs
    assert isinstance(jobs, Jobs)
    return jobs
