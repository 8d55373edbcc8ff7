"""The ASGI application: routes, errors, metrics and the gate, around a service."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware

from latentrt import __version__
from latentrt.errors import LatentrtError
from latentrt.serve.http import health, openai_api, sdapi
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.http.context import Context
from latentrt.serve.http.door import Door, too_much
from latentrt.serve.http.gate import Bounded, Gate, cross_origin, most_bytes
from latentrt.serve.http.page_route import add_page
from latentrt.serve.http.problems import STORAGE, Answer, answer_to, answer_to_status, answer_to_validation, not_kept
from latentrt.serve.process.logs import logger
from latentrt.serve.process.metrics import Metrics
from latentrt.serve.process.records import Records

if TYPE_CHECKING:
    from latentrt.serve.core.service import Service

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]
# Parts of a form: every field there is, with room for repeated ones.
_MOST_FIELDS, _MOST_FILES = 64, 18


def create_app(
    service: Service, catalog: Catalog, *, metrics: Metrics | None = None, lifespan: Lifespan | None = None
) -> FastAPI:
    """The application.

    Args:
        service: what draws.
        catalog: the model as clients see it, with the settings that hold.
        metrics: the service's observer; None where the service has another one.
        lifespan: what runs around the serving, if anything.

    Raises:
        RequestError: the keys cannot be read.
    """
    settings = catalog.settings
    metrics = metrics or Metrics(catalog.name)
    context = Context(service, settings, catalog, metrics)
    _gauges(context)
    keys, bound, records = settings.secrets(), partial(most_bytes, settings), Records(metrics)
    door = Door(
        keys=keys, most_bytes=bound, full=service.full, records=records, cross_origin=bool(settings.cors_origin)
    )
    app = FastAPI(
        title="latentrt",
        summary="Stable Diffusion: the OpenAI Images API, and a thin one of A1111.",
        version=__version__,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # there are metrics and a log
        lifespan=lifespan,
        strict_content_type=True,
        form_limits={
            "max_fields": _MOST_FIELDS,
            "max_files": _MOST_FILES,
            "max_part_size": 4 * settings.max_prompt + 1024,
        },
        middleware=[
            *cross_origin(settings.cors_origin),
            Middleware(Gate, door=door, records=records, body_timeout=settings.body_timeout),
            Middleware(Bounded, most_bytes=bound),
        ],
    )
    app.state.context, app.state.door = context, door
    for router in (openai_api.router, sdapi.router):  # first, since they are looked through in this order
        # The gate checks keys; this only tells readers of the description that there are some.
        app.include_router(router, dependencies=[Depends(HTTPBearer(auto_error=False))] if keys else [])
    app.include_router(health.router)
    add_page(app)
    for kind in (LatentrtError, RequestValidationError, HTTPException):
        app.add_exception_handler(kind, _answer)
    return app


def _gauges(context: Context) -> None:
    service, board, metrics = context.service, context.board, context.metrics
    metrics.gauge("num_requests_running", "Requests whose first step has run.", lambda: _count(board, True))
    metrics.gauge("num_requests_waiting", "Requests whose first step has not run.", lambda: _count(board, False))
    metrics.gauge("num_images_running", "Pictures that have lanes.", lambda: service.running)
    metrics.gauge("num_images_waiting", "Pictures that wait for lanes.", lambda: service.waiting)
    metrics.gauge("ready", "1 if requests are taken.", lambda: float(service.ready))


def _count(board: Any, running: bool) -> int:
    return sum((entry.started is not None) is running for entry in board)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    """Any error that a route or the framework raised, in OpenAI's shape."""
    answer = _answer_of(request, error)
    facts = request.scope["state"]["facts"]
    facts["outcome"] = answer.code
    if answer.status == 500 or answer.code == STORAGE:
        logger().error("a request failed", id=facts["id"], exc_info=error)
    return JSONResponse(answer.body, answer.status, answer.headers)


def _answer_of(request: Request, error: Exception) -> Answer:
    if isinstance(error, RequestValidationError):
        return answer_to_validation(error.errors())
    if isinstance(error, HTTPException):
        if isinstance(error.__cause__, OSError):  # a form that could not be kept: FastAPI calls it the client's fault
            return not_kept()
        if error.status_code == 413:
            return too_much(most_bytes(request.app.state.context.settings, request.url.path))
        answer = answer_to_status(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        if error.status_code == 405:  # Starlette lists the methods of the path's first route alone
            methods = request.app.openapi()["paths"].get(request.url.path, {})
            headers |= {"Allow": ", ".join(methods).upper()} if methods else {}
        return Answer(answer.status, answer.code, answer.message, None, headers)
    return answer_to(error)
