"""/v1/images/jobs: status, previews and results of background jobs. A job is its client's alone."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from latentrt.serve.http.background.schema import JOBS, JobDeleted, JobList, JobStatus
from latentrt.serve.http.background.store import Job
from latentrt.serve.http.errors import Problem, documented
from latentrt.serve.http.generation import Context, Served
from latentrt.serve.http.images import in_thread
from latentrt.serve.http.openai_schema import ImagesResponse

router = APIRouter(tags=["background jobs"], responses=documented(401, 404))
_FILES = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "jpeg", "webp")}
_KEPT = {
    200: {"model": ImagesResponse, "description": "What the request would have been answered without `background`."},
    **documented(400, 401, 404, 409, 429, 500, 503, 504),
}


@router.get(JOBS)
async def list_jobs(http: HttpRequest, context: Served) -> JobList:
    """This client's jobs that wait, run, or are kept, the newest first."""
    jobs, handles = context.jobs, context.scheduler.handles
    return JobList(data=[jobs.status(job, handles) for job in jobs.own(http.state.facts["owner"])])


@router.get(f"{JOBS}/{{job}}")
async def retrieve_job(job: str, http: HttpRequest, context: Served) -> JobStatus:
    """How far a job is."""
    return context.jobs.status(_job(job, http, context), context.scheduler.handles)


@router.get(
    f"{JOBS}/{{job}}/preview",
    response_class=Response,
    responses={200: {"content": _FILES, "description": "The newest preview or picture."}, **documented(401, 404)},
)
async def preview_job(job: str, http: HttpRequest, context: Served) -> Response:
    """The newest preview, of those that `partial_images` asked for, or the newest picture."""
    found = _job(job, http, context)
    shown, style = None if found.handle is None else found.handle.shown, found.style
    if shown is not None:
        file = await in_thread(partial(style.file, shown))
    elif found.drawn:
        file = found.drawn[-1].file
    else:
        raise Problem(
            "there is no preview",
            needed="a job that has begun, and was ordered with partial_images",
            status=404,
            code="no_preview",
        )
    return Response(file, media_type=f"image/{style.kind}", headers={"cache-control": "no-store"})


@router.get(f"{JOBS}/{{job}}/result", responses=_KEPT, response_class=JSONResponse)
async def result_of_job(job: str, http: HttpRequest, context: Served) -> Response:
    """What the request would have been answered without `background`: pictures, or the error that it ended in."""
    found = _job(job, http, context)
    if found.progress is None:
        status = context.jobs.status(found).status
        needed, fix = "one that is over", "ask for its status until then, or name a webhook_url"
        raise Problem(f"the job is {status}", needed, fix, status=409, code="not_finished")
    found.read = True
    if found.failure is not None:
        http.state.facts["outcome"] = found.failure.code
        return found.failure.response
    return JSONResponse(await in_thread(partial(found.style.kept, found.drawn, found.progress.warnings)))


@router.delete(f"{JOBS}/{{job}}")
async def delete_job(job: str, http: HttpRequest, context: Served) -> JobDeleted:
    """Cancel a job that waits or runs, which is kept as cancelled; forget one that is over, and its pictures."""
    found = _job(job, http, context)
    if found.handle is None:
        context.jobs.forget(found)
        return JobDeleted(id=found.id, status=context.jobs.status(found).status, deleted=True)
    context.scheduler.cancel(found.handle)
    if found.task is not None:
        await asyncio.wait([found.task])
    return JobDeleted(id=found.id, status=context.jobs.status(found).status, deleted=False)


def _job(id: str, http: HttpRequest, context: Context) -> Job:
    return context.jobs.of(id, http.state.facts["owner"])
