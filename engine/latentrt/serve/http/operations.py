"""For operators and the page: health, metrics, the queue, and what clients may choose from."""

from __future__ import annotations

import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, Field
from starlette.responses import Response

from latentrt.serve.core.handle import Handle
from latentrt.serve.http.errors import Problem, documented
from latentrt.serve.http.generation import Context, Served
from latentrt.serve.http.models.models import models_of, serving

router = APIRouter(tags=["operations"])


class Health(BaseModel):
    """Of the server."""

    status: str = Field(description="ok, starting, draining or failed")


class Readiness(Health):
    """Whether it takes requests."""

    models: dict[str, str] | None = Field(None, description="The state of each model, where there are several.")


class Job(BaseModel):
    """A request for pictures that waits or runs."""

    id: str
    api: str
    model: str
    state: Literal["waiting", "running"]
    pictures: int
    done: int
    rows: int
    row: int
    progress: float
    queue_seconds: float
    seconds: float


class Queue(BaseModel):
    """What the server is doing. Pictures are counted, not requests; prompts are not shown."""

    state: str = Field(description="starting, ready, draining or failed")
    waiting: int
    running: int
    capacity: int
    jobs: list[Job]


@router.get("/health/live")
async def live() -> Health:
    """200 as long as the process can answer."""
    return Health(status="ok")


@router.get("/health/ready", responses={503: {"model": Readiness, "description": "It takes no requests now."}})
async def ready(http: Request) -> JSONResponse:
    """200 if requests are taken, 503 if not: starting, draining, or failed until a self-check passes.

    Of several models one that takes them is enough; `models` has the state of each, "unloaded" where a request would
    load it.
    """
    models = models_of(http)
    state = models.state
    told: dict[str, Any] = {"status": "ok" if state == "ready" else state}
    if models.several:
        told["models"] = {one.name: one.state for one in models.entries}
    return JSONResponse(told, 200 if state == "ready" else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(context: Served) -> Response:
    """For Prometheus."""
    return Response(await context.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/latentrt/queue", responses=documented(401))
async def queue(http: Request) -> Queue:
    """Every request that waits or runs, oldest first, and how far it is; those that wait for a model are counted."""
    models = models_of(http)
    return Queue(
        state=models.state,
        waiting=sum(one.pictures for one in models.entries),
        running=sum(one.running for one in models.entries),
        capacity=sum(one.settings.queue for one in models.entries),
        jobs=[_job(entry.name, handle) for entry, handle in models.handles],
    )


def _job(model: str, handle: Handle) -> Job:
    """Return what all clients may know of a request: no prompt, no picture."""
    return Job(
        id=handle.id,
        api=handle.api,
        model=model,
        state="waiting" if handle.started is None else "running",
        pictures=handle.request.count,
        done=handle.done,
        rows=handle.rows,
        row=handle.row,
        progress=round(handle.progress, 4),
        queue_seconds=round(handle.queue_seconds, 3),
        seconds=round(time.monotonic() - handle.came, 3),
    )


@router.get("/latentrt/model", responses=documented(401))
async def model(http: Request, model: str | None = None) -> dict[str, Any]:
    """What a page or a client may offer of a model, or of the first: names, sizes, limits, defaults, solvers, and what
    it reads: prompts, class labels (below `classes`, where that is known), pictures to edit; `controls`, `ip_adapters`
    and `loras` by name, and each control's kind in `control_kinds`: "controlnet", "controlnet_union", which needs a
    type, or "t2i_adapter", which has no guess mode.
    `needs_picture`, `needs_mask` and `needs_depth` are those that it draws from alone. `strength` and `masks` say
    whether edits have them, `enlarges` how many times as large as the given picture the drawn one is (null: as large).
    `models` are all that the server has; one that never was loaded is loaded to answer this.
    """
    models, context = models_of(http), await _described(http, model)
    catalog, settings, defaults = context.catalog, context.settings, context.catalog.defaults
    fields = ("negative_prompt", "image_guidance", "noise_level")
    return {
        "model": catalog.name,
        "names": catalog.names,
        "models": [one.name for one in models.entries],
        "size": "{}x{}".format(*catalog.sizes.own),
        "sizes": [f"{width}x{height}" for width, height in catalog.sizes.listed],
        "step": catalog.latents.step,
        "limits": {
            "max_side": catalog.sizes.most_side,
            "max_pixels": catalog.sizes.most_pixels,
            "max_prompt": settings.max_prompt,
            "max_image_bytes": settings.max_image_bytes,
            "max_n": settings.most_pictures,
            "max_steps": catalog.max_steps,
            "max_noise_level": catalog.max_noise_level,
        },
        "defaults": {
            "steps": defaults.steps,
            "guidance": defaults.guidance,
            "image_guidance": defaults.image_guidance,
            "scheduler": defaults.solver,
        },
        "schedulers": tuple(catalog.solvers),
        "prompted": catalog.prompted,
        "class_labels": "class_label" in catalog.fields,
        **{name: name in catalog.fields for name in fields},
        "refiner": catalog.refiner,
        "controls": tuple(catalog.controls),
        "control_kinds": catalog.controls,
        "ip_adapters": catalog.ip_adapters,
        "loras": catalog.loras,
        "classes": catalog.classes,
        "edits": catalog.edits,
        "strength": not catalog.shows_picture,
        "masks": "mask" in catalog.reads,
        "needs_picture": "image" in catalog.pictures,
        "needs_mask": "mask" in catalog.pictures,
        "needs_depth": "depth" in catalog.pictures,
        "enlarges": catalog.enlarges if catalog.enlarges > 1 else None,
    }


async def _described(http: Request, name: str | None) -> Context:
    """Return a model's parts. A dropped model keeps its catalog, so it can still be described."""
    return models_of(http).find(name).context or await serving(http, name)


@router.post("/latentrt/jobs/{job}/cancel", responses=documented(401, 404))
async def cancel(job: str, http: Request) -> JSONResponse:
    """Give up every request of this key with this x-request-id; its client gets 409 cancelled."""
    owner = http.state.facts["owner"]
    found = [(one, handle) for one, handle in models_of(http).handles if (handle.id, handle.owner) == (job, owner)]
    for entry, handle in found:
        if entry.scheduler is not None:
            entry.scheduler.cancel(handle)
    if not found:
        raise Problem(
            f"no request {job[:128]!r} waits or runs",
            needed="one that /latentrt/queue lists",
            fix="look there",
            status=404,
            code="not_found",
        )
    return JSONResponse({"cancelled": len(found)})
