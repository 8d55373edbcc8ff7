"""/v1/images/jobs: status, previews and results of background jobs. A job is its client's alone."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from starlette.responses import Response

from latentrt.serve.http.background.schema import JOBS, JobDeleted, JobList, JobStatus
from latentrt.serve.http.background.store import Job, jobs_of
from latentrt.serve.http.errors import Problem, documented
from latentrt.serve.http.images import in_thread
from latentrt.serve.http.openai.schema import ImagesResponse
from latentrt.serve.http.utf8 import Utf8Response

router = APIRouter(tags=["background jobs"], responses=documented(401, 404))
_FILES = {f"image/{kind}": {"schema": {"type": "string", "format": "binary"}} for kind in ("png", "jpeg", "webp")}
_KEPT = {
    200: {"model": ImagesResponse, "description": "What the request would have been answered without `background`."},
    **documented(400, 401, 404, 409, 429, 500, 503, 504),
}


@router.get(JOBS)
async def list_jobs(http: HttpRequest) -> JobList:
    """This client's jobs that wait, run, or are kept, the newest first."""
    jobs = jobs_of(http)
    return JobList(data=[jobs.status(job) for job in jobs.own(http.state.facts["owner"])])


@router.get(f"{JOBS}/{{job}}")
async def retrieve_job(job: str, http: HttpRequest) -> JobStatus:
    """How far a job is."""
    return jobs_of(http).status(_job(job, http))


@router.get(
    f"{JOBS}/{{job}}/preview",
    response_class=Response,
    responses={200: {"content": _FILES, "description": "The newest preview or picture."}, **documented(401, 404)},
)
async def preview_job(job: str, http: HttpRequest) -> Response:
    """The newest preview, of those that `partial_images` asked for, or the newest picture."""
    found = _job(job, http)
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
async def result_of_job(job: str, http: HttpRequest) -> Response:
    """What the request would have been answered without `background`: pictures, or the error that it ended in."""
    found = _job(job, http)
    if found.progress is None:
        status = jobs_of(http).status(found).status
        needed, fix = "one that is over", "ask for its status until then, or name a webhook_url"
        raise Problem(f"the job is {status}", needed, fix, status=409, code="not_finished")
    found.read = True
    if found.failure is not None:
        http.state.facts["outcome"] = found.failure.code
        return found.failure.response
    return Utf8Response(await in_thread(partial(found.style.kept, found.drawn, found.progress.warnings)))


@router.delete(f"{JOBS}/{{job}}")
async def delete_job(job: str, http: HttpRequest) -> JobDeleted:
    """Cancel a job that waits or runs, which is kept as cancelled; forget one that is over, and its pictures."""
    jobs, found = jobs_of(http), _job(job, http)
    over = found.handle is None
    if over:
        jobs.forget(found)
    else:
        await jobs.cancel(found)
    return JobDeleted(id=found.id, status=jobs.status(found).status, deleted=over)


def _job(id: str, http: HttpRequest) -> Job:
    return jobs_of(http).of(id, http.state.facts["owner"])
