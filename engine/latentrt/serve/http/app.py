"""The ASGI application: routes, errors, metrics and the guard, around a scheduler."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from latentrt import __version__
from latentrt.errors import LatentrtError
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http import operations
from latentrt.serve.http.background.routes import router as background
from latentrt.serve.http.background.store import Jobs
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.http.errors import (
    STORAGE,
    Answer,
    answer_to,
    answer_to_status,
    answer_to_validation,
    too_large,
)
from latentrt.serve.http.generation import Context
from latentrt.serve.http.guard.middleware import Guard, most_bytes
from latentrt.serve.http.guard.origins import cross_origin
from latentrt.serve.http.guard.record import Record
from latentrt.serve.http.models.entry import ON_DEMAND, Entry
from latentrt.serve.http.models.models import Models
from latentrt.serve.http.openai import routes as openai_routes
from latentrt.serve.http.page import add_page
from latentrt.serve.http.sdapi.answers import response_to
from latentrt.serve.http.sdapi.controlnet import router as controlnet
from latentrt.serve.http.sdapi.routes import router as sdapi
from latentrt.serve.process.config import Settings
from latentrt.serve.process.keys import Keys
from latentrt.serve.process.logs import logger
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.process.traces import Traces

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
# Parts of a form: every field there is, with room for repeated ones.
_MOST_FIELDS, _MOST_FILES = 64, 18


def create_app(
    scheduler: Scheduler,
    catalog: Catalog,
    *,
    metrics: Metrics | None = None,
    lifespan: Lifespan | None = None,
    gpu_memory: Callable[[], tuple[int, int]] | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """Return the application of one model, which is loaded and stays.

    Args:
        scheduler: takes the requests.
        catalog: the model as clients see it, with the settings that hold.
        metrics: the scheduler's observer; None where it has another one.
        gpu_memory: tells the bytes of the engine's GPU that are free, and all; None where it has none.
        lifespan, traces: as of `app_of`.

    Raises:
        RequestError: the keys cannot be read.
    """
    context = Context(scheduler, catalog.settings, catalog, metrics or Metrics(catalog.name), gpu_memory)
    return app_of(Models.of(context), catalog.settings, lifespan=lifespan, traces=traces)


def app_of(
    models: Models, settings: Settings, *, lifespan: Lifespan | None = None, traces: Traces | None = None
) -> FastAPI:
    """Return the application of a server's models.

    Args:
        models: take the requests.
        settings: of the server.
        lifespan: runs around the serving, if given.
        traces: makes spans of requests; None: none are made.

    Raises:
        RequestError: the keys cannot be read.
    """
    keys, first = Keys(settings), models.described(models.entries[0])
    metrics = first.metrics
    for entry in models.entries:
        _add_gauges(metrics.of(entry.name), entry)
    if first.gpu_memory is not None:
        metrics.gpu_memory(partial(_gpu_memory, models))
    record = Record(metrics, traces)
    app = FastAPI(
        title="latentrt",
        summary="Stable Diffusion: the OpenAI Images API, and a thin one of A1111.",
        version=__version__,
        docs_url=None,  # their pages load scripts from other servers
        redoc_url=None,
        servers=[{"url": ".", "description": "This one: relative to the description's own address, below any path."}],
        root_path_in_servers=False,
        redirect_slashes=False,  # to an address that knows no path or TLS of a proxy
        telemetry={"tracing": False, "metrics": False, "logs": False},  # there are metrics and a log
        lifespan=_watching(models, lifespan),
        form_limits={
            "max_fields": _MOST_FIELDS,
            "max_files": _MOST_FILES,
            "max_part_size": settings.max_body if settings.takes_maps else 4 * settings.max_prompt + 1024,
        },
        middleware=[
            *cross_origin(settings.cors_origin),
            Middleware(Guard, keys=keys, settings=settings, models=models, record=record),
        ],
    )
    app.state.models, app.state.metrics, app.state.keys, app.state.settings = models, metrics, keys, settings
    app.state.jobs = Jobs(settings, metrics, record)
    for router in (openai_routes.router, background, sdapi, controlnet):  # first: paths are compared in this order
        # The guard checks keys; this only puts them into the description.
        app.include_router(router, dependencies=[Depends(HTTPBearer(auto_error=False))] if keys else [])
    app.include_router(operations.router)
    add_page(app)
    for kind in (LatentrtError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    return app


def _watching(models: Models, lifespan: Lifespan | None) -> Lifespan:
    @asynccontextmanager
    async def watching(app: FastAPI) -> AsyncIterator[None]:
        async with models.loader.watching():
            if lifespan is None:
                yield
            else:
                async with lifespan(app):
                    yield

    return watching


def _add_gauges(metrics: Metrics, entry: Entry) -> None:
    def requests(running: bool) -> float:
        handles = () if entry.scheduler is None else entry.scheduler.handles
        return sum((handle.started is not None) is running for handle in handles)

    metrics.gauge("num_requests_running", "Requests whose first step has run.", lambda: requests(True))
    metrics.gauge("num_requests_waiting", "Requests whose first step has not run.", lambda: requests(False))
    metrics.gauge("num_images_running", "Pictures that have lanes.", lambda: entry.running)
    metrics.gauge("num_images_waiting", "Pictures that wait for lanes, or for their model.", lambda: entry.pictures)
    metrics.gauge("ready", "1 if requests are taken.", lambda: float(entry.state in ("ready", *ON_DEMAND)))
    metrics.gauge("model_loaded", "1 if the model is loaded.", lambda: float(entry.opened is not None))


def _gpu_memory(models: Models) -> tuple[int, int]:
    """Return the bytes of the GPU of the first model, as it is now: it may have been dropped and loaded again."""
    read = models.described(models.entries[0]).gpu_memory
    assert read is not None
    return read()


async def _answer(http: Request, error: Exception) -> JSONResponse:
    """Answer an error that a route or the framework raised, in the shape of its API."""
    answer = _answer_of(http, error)
    facts = http.state.facts
    facts["outcome"] = answer.code
    if answer.status == 500 or answer.code == STORAGE:
        logger().error("a request failed", id=facts["id"], exc_info=error)
    return response_to(answer, http.url.path)


def _answer_of(http: Request, error: Exception) -> Answer:
    if isinstance(error, RequestValidationError):
        return answer_to_validation(error.errors())
    if not isinstance(error, HTTPException):
        return answer_to(error)
    if isinstance(error.__cause__, OSError):  # a form that could not be kept: FastAPI calls it the client's fault
        message = "the server has no room for this upload: its temporary folder is full or cannot be written"
        return Answer(503, STORAGE, message)
    if error.status_code == 413:
        return too_large(most_bytes(http.app.state.settings, http.url.path))
    headers = dict(error.headers or {})
    if error.status_code == 405:  # Starlette lists the methods of the path's first route alone
        template = getattr(http.scope.get("route"), "path", "")
        paths = http.app.openapi()["paths"]
        methods = paths.get(http.url.path) or paths.get(template) or {}
        headers |= {"Allow": ", ".join(methods).upper()} if methods else {}
    return answer_to_status(error.status_code, str(error.detail), headers)
