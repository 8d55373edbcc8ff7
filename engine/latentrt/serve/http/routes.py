"""What the routes of an API have in common: the media type they read, and how they document their errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from latentrt.serve.http.problems import Problem
from latentrt.serve.http.wire import ErrorResponse

_MEANING = {
    400: "invalid_value, unsupported_size or image_decode_failed; `param` names the field",
    401: "invalid_api_key",
    404: "model_not_found, or not_found",
    408: "body_timeout",
    409: "cancelled: somebody interrupted it",
    413: "body_too_large or image_too_large",
    415: "unsupported_media_type",
    429: "queue_full or deadline_unreachable; see Retry-After",
    500: "engine_error",
    503: "not_ready or draining, see Retry-After; or insufficient_storage",
    504: "queue_timeout or run_timeout",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of routes that may answer so; all have one shape."""
    known: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorResponse, "description": _MEANING[status]} for status in statuses
    }
    # "default" also keeps FastAPI from documenting a 422 of its own, which no route answers.
    return {**known, "default": {"model": ErrorResponse, "description": "Any other error."}}


class Media(APIRoute):
    """A route that refuses a body of another media type than the one it documents, before it is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        needed = getattr(self.body_field.field_info, "media_type", "application/json") if self.body_field else None

        async def checked(request: Request) -> Response:
            if needed is not None:
                _check_media(request.headers.get("content-type", ""), needed)
            return await handle(request)

        return checked


def _check_media(found: str, needed: str) -> None:
    kind = found.partition(";")[0].strip().lower()
    if kind != needed:
        raise Problem(
            f"the body's Content-Type is {kind[:100]!r}" if kind else "the body has no Content-Type",
            needed=needed,
            fix=f"send it with Content-Type: {needed}",
            status=415,
            code="unsupported_media_type",
        )
