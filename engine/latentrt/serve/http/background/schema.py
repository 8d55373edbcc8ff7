"""What clients are told of background jobs, in the form of OpenAI's own: its videos, responses and lists."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field

from latentrt.serve.core.handle import Handle, Stage
from latentrt.serve.http.errors import ErrorDetail

if TYPE_CHECKING:
    from latentrt.serve.http.background.store import Job

JOBS = "/v1/images/jobs"
Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]


class JobStatus(BaseModel):
    """A background job. It is queued until its first step has run."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Status
    progress: Annotated[int, Field(ge=0, le=100, description="Percent of the network's calls; 100 when completed.")]
    created_at: int
    completed_at: Annotated[int | None, Field(description="When it ended, however; null until then.")]
    expires_at: Annotated[int | None, Field(description="Until when it is kept; null until it has ended.")]
    model: str
    request_id: Annotated[str, Field(description="The x-request-id of its order; /latentrt/queue has it.")]
    size: str
    n: int
    done: Annotated[int, Field(description="Pictures that are finished.")]
    row: Annotated[int, Field(description="Steps of the picture that is furthest, of `rows`.")]
    rows: int
    ahead: Annotated[
        int | None,
        Field(description="While queued: pictures that wait and came before. Shares may change their order."),
    ]
    queue_seconds: float
    eta_seconds: Annotated[float | None, Field(description="Until its end, by its pace so far; null where unknown.")]
    error: ErrorDetail | None
    warnings: list[str]
    preview: Annotated[str | None, Field(description="Path of its newest picture, below the server's address.")]
    result: Annotated[str | None, Field(description="Path of its result, once there is one.")]


class JobList(BaseModel):
    """A client's jobs, the newest first."""

    object: Literal["list"] = "list"
    data: list[JobStatus]


class JobDeleted(BaseModel):
    """What became of a job: cancelled, and still kept; or, where it was over, forgotten."""

    id: str
    object: Literal["image.job"] = "image.job"
    status: Status
    deleted: bool


class Progress(NamedTuple):
    """How far a request is, without its pictures."""

    request_id: str
    n: int
    done: int
    row: int
    rows: int
    part: float
    queue_seconds: float
    eta_seconds: float | None
    started: bool
    shown: bool
    warnings: list[str]

    @classmethod
    def of(cls, handle: Handle) -> Progress:
        """Return it as it is now."""
        part, eta = handle.progress, None
        if part and handle.started is not None:
            eta = (time.monotonic() - handle.started) / part * (1 - part)
        return cls(
            request_id=handle.id,
            n=handle.request.count,
            done=handle.done,
            row=handle.row,
            rows=handle.rows,
            part=part,
            queue_seconds=round(handle.queue_seconds, 3),
            eta_seconds=None if eta is None else round(eta, 3),
            started=handle.started is not None,
            shown=handle.shown is not None,
            warnings=handle.warnings,
        )


def path_of(id: str) -> str:
    """Return the path of a job."""
    return f"{JOBS}/{id}"


def status_of(job: Job, progress: Progress, expires: float | None) -> JobStatus:
    """Return what a client is told of a job; `expires` is in Unix seconds, None while it is not over."""
    status, failure, over = _status(job, progress), job.failure, job.ended is not None
    shown = bool(job.drawn) if over else progress.shown
    return JobStatus(
        id=job.id,
        status=status,
        progress=100 if status == "completed" else min(99, int(100 * progress.part)),
        created_at=int(job.created),
        completed_at=None if job.ended is None else int(job.ended),
        expires_at=None if expires is None else int(expires),
        model=job.model,
        request_id=progress.request_id,
        size=str(job.style.own["size"]),
        n=progress.n,
        done=progress.done,
        row=progress.row,
        rows=progress.rows,
        ahead=_ahead(job.handle, job.scheduler.handles) if job.handle is not None and status == "queued" else None,
        queue_seconds=progress.queue_seconds,
        eta_seconds=None if over else progress.eta_seconds,
        error=None if failure is None else ErrorDetail(**failure.body["error"]),
        warnings=progress.warnings,
        preview=f"{path_of(job.id)}/preview" if shown else None,
        result=f"{path_of(job.id)}/result" if job.drawn else None,
    )


def _status(job: Job, progress: Progress) -> Status:
    if job.ended is None:
        return "in_progress" if progress.started else "queued"
    if job.failure is None:
        return "completed"
    return "cancelled" if job.failure.code == "cancelled" else "failed"


def _ahead(handle: Handle, handles: Sequence[Handle]) -> int:
    """Return how many pictures wait that came before those of a request; `handles` are all, oldest first."""
    before = handles[: handles.index(handle)] if handle in handles else ()
    return sum(slot.stage is Stage.WAITING for other in before for slot in other.slots)
