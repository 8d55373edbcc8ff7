"""/sdapi/v1/progress, interrupt and skip: what becomes of a client's own requests."""

from __future__ import annotations

import time
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from latentrt.serve.core.handle import Handle
from latentrt.serve.http.images import encode, in_thread
from latentrt.serve.http.models.entry import Entry
from latentrt.serve.http.models.models import models_of
from latentrt.serve.http.sdapi.drawing import API
from latentrt.serve.http.sdapi.schema import ProgressReport, State

router = APIRouter()


@router.get("/progress")
async def progress(http: HttpRequest, id_task: str | None = None, skip_current_image: bool = False) -> ProgressReport:
    """Of one task, or of the oldest that runs."""
    handles = [handle for _, handle in _own(http, id_task)]
    if not handles:
        return ProgressReport(progress=0.0, eta_relative=0.0, state=State())
    handle = next((handle for handle in handles if handle.started is not None), handles[0])
    image = None
    if handle.shown is not None and not skip_current_image:
        image = await in_thread(partial(encode, handle.shown))
    part, taken = handle.progress, time.monotonic() - handle.came - handle.queue_seconds
    state = State(
        interrupted=any(slot.stops for slot in handle.slots),
        job=handle.task or handle.id,
        job_count=handle.request.count,
        job_no=handle.done,
        sampling_step=handle.row,
        sampling_steps=handle.rows,
    )
    eta = taken / part * (1 - part) if part else 0.0
    return ProgressReport(progress=part, eta_relative=eta, state=state, current_image=image)


@router.post("/interrupt")
async def interrupt(http: HttpRequest, id_task: str | None = None) -> dict[str, str]:
    """End one task, or all that this key's A1111 clients have, with what they drew so far; never those of others.

    Pictures that run end with the prediction of one more row, those that wait are left out. A request of which nothing
    has begun gets 409.
    """
    _stop(http, id_task, waiting=True)
    return {}


@router.post("/skip")
async def skip(http: HttpRequest, id_task: str | None = None) -> None:
    """End pictures that run in the same way; those that wait are drawn."""
    _stop(http, id_task, waiting=False)


def _stop(http: HttpRequest, task: str | None, *, waiting: bool) -> None:
    for entry, handle in _own(http, task):
        if entry.scheduler is not None:
            entry.scheduler.stop(handle, waiting=waiting)


def _own(http: HttpRequest, task: str | None) -> list[tuple[Entry, Handle]]:
    """Return this key's requests by this API, oldest first, each with its model; those of one task, if it is given."""
    owner = http.state.facts["owner"]
    own = [(one, handle) for one, handle in models_of(http).handles if (handle.api, handle.owner) == (API, owner)]
    return [(one, handle) for one, handle in own if task in (None, handle.task)]
