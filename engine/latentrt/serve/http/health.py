"""Is it alive, is it ready, what does it measure, what is it doing."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.responses import Response

from latentrt.serve.http.context import Served
from latentrt.serve.http.problems import Problem
from latentrt.serve.http.routes import errors
from latentrt.serve.process.metrics import CONTENT_TYPE

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """Of the server."""

    status: str = Field(description="ok, starting, draining or failed")


class Job(BaseModel):
    """A request for pictures that waits or runs."""

    id: str
    api: str
    state: Literal["waiting", "running"]
    pictures: int
    done: int
    rows: int
    row: int
    progress: float
    queue_seconds: float
    seconds: float


class Queue(BaseModel):
    """What the server is doing. Pictures are counted, not requests; prompts are nobody else's business."""

    state: str = Field(description="starting, ready, draining or failed")
    waiting: int
    running: int
    capacity: int
    jobs: list[Job]


@router.get("/health/live")
async def live() -> Health:
    """200 as long as the process can answer."""
    return Health(status="ok")


@router.get("/health/ready", responses={503: {"model": Health, "description": "It takes no requests now."}})
async def ready(context: Served) -> JSONResponse:
    """200 if requests are taken, 503 if not: starting, draining, or failed until a self-check passes."""
    good = context.service.ready
    return JSONResponse({"status": "ok" if good else context.service.state}, 200 if good else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: Served) -> Response:
    """For Prometheus."""
    return Response(await context.metrics.whole_text(), media_type=CONTENT_TYPE)


@router.get("/latentrt/queue", responses=errors(401))
async def queue(context: Served) -> Queue:
    """Every request that waits or runs, oldest first, and how far it is."""
    service = context.service
    return Queue(
        state=service.state,
        waiting=service.waiting,
        running=service.running,
        capacity=context.settings.queue,
        jobs=[Job(**entry.facts()) for entry in context.board],
    )


@router.get("/latentrt/model", responses=errors(401))
async def model(context: Served) -> dict[str, Any]:
    """What a page or a client may offer: names, the model's own size, limits, defaults, solvers, edits."""
    catalog, settings = context.catalog, context.settings
    return {
        "model": catalog.name,
        "names": catalog.names,
        "size": "{}x{}".format(*catalog.own),
        "sizes": ["{}x{}".format(*size) for size in catalog.sizes],
        "step": catalog.factor,
        "limits": {
            name: getattr(settings, name)
            for name in ("max_side", "max_pixels", "max_steps", "max_prompt", "max_image_bytes")
        }
        | {"max_n": settings.most_pictures},
        "defaults": {"steps": settings.steps, "guidance": settings.guidance, "scheduler": settings.scheduler},
        "schedulers": catalog.solver_names,
        "edits": catalog.edits,
    }


@router.post("/latentrt/jobs/{job}/cancel", responses=errors(401, 404))
async def cancel(job: str, http: Request, context: Served) -> JSONResponse:
    """Give up every request of this key with this x-request-id; whoever waits for it gets 409 cancelled."""
    owner = http.scope["state"]["facts"]["owner"]
    entries = [entry for entry in context.board if (entry.id, entry.owner) == (job, owner)]
    for entry in entries:
        entry.ticket.cancel()
    if not entries:
        raise Problem(
            f"no request {job[:128]!r} waits or runs",
            needed="one that /latentrt/queue lists",
            fix="ask there",
            status=404,
            code="not_found",
        )
    return JSONResponse({"cancelled": len(entries)})
