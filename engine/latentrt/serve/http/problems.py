"""Every error as HTTP: OpenAI's shape, a status, and what a client should do next."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from latentrt.errors import LatentrtError, RequestError, ScheduleError, UnknownSolverError


class Problem(RequestError):  # noqa: N818 - as RFC 9457 calls it
    """A refusal that knows its status, code and the parameter it is about.

    Args:
        found, needed, fix: as of every LatentrtError.
        status: of HTTP.
        code: for machines, as "invalid_value".
        param: the request's field, by the name that the client used.
    """

    def __init__(
        self,
        found: str,
        needed: str,
        fix: str = "",
        *,
        param: str | None = None,
        status: int = 400,
        code: str = "invalid_value",
    ) -> None:
        super().__init__(found, needed, fix)
        self.param = param
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Answer:
    """An error, ready for the wire."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


STORAGE = "insufficient_storage"  # as WebDAV calls it
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_STATUS = {  # of the service's own errors, by their code
    "queue_full": 429,
    "deadline_unreachable": 429,
    "not_ready": 503,
    "draining": 503,
    "queue_timeout": 504,
    "run_timeout": 504,
    "cancelled": 409,
}
# What was interrupted or took too long would end the same way again, and cost as much.
_NO_RETRY = {409, 504}
_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "body_too_large"}


def answer_to(error: BaseException) -> Answer:
    """What a client is told of an error; anything that is not its own fault is an engine_error without details."""
    if isinstance(error, Problem):
        return Answer(error.status, error.code, str(error), error.param)
    if isinstance(error, LatentrtError):
        code = getattr(error, "code", None)
        if code in _STATUS:
            return _of_service(error, code)
        if isinstance(error, UnknownSolverError | ScheduleError):
            return Answer(400, "invalid_value", str(error), "scheduler")
        if isinstance(error, RequestError):
            return Answer(400, "invalid_value", str(error))
        return Answer(500, "engine_error", str(error))
    return Answer(500, "engine_error", "the engine failed; the log has the details under this request's x-request-id")


def _of_service(error: LatentrtError, code: str) -> Answer:
    status = _STATUS[code]
    headers = {}
    wait = getattr(error, "retry_after", None)
    if wait is not None and math.isfinite(wait):
        headers["retry-after"] = str(max(1, math.ceil(wait)))
    if status in _NO_RETRY:
        headers["x-should-retry"] = "false"
    return Answer(status, code, str(error), None, headers)


def not_kept() -> Answer:
    """What a client is told whose upload could not be written to the temporary folder."""
    message = "the server has no room for this upload: its temporary folder is full or cannot be written"
    return Answer(503, STORAGE, message)


def answer_to_status(status: int, detail: str) -> Answer:
    """What a client is told where the framework itself refused: no such path, no such method, a broken body."""
    code = _OF_STATUS.get(status, "invalid_value" if status < 500 else "engine_error")
    return Answer(status, code, "there is no such path; /openapi.json lists them" if detail == "Not Found" else detail)


def answer_to_validation(errors: Any) -> Answer:
    """The first of pydantic's complaints. What was sent is not repeated: it may be a prompt, or long."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = where[0] if where and first["type"] != "json_invalid" else None
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        text = "the body is no JSON"
    elif first["type"] == "extra_forbidden":
        text = f"{param} is not a parameter here"
    elif first["type"] == "missing":
        text = f"{param or 'the body'} is missing"
    elif first["type"] == "none_required":
        text = f"{param} is not supported"
    elif text.startswith("Expected UploadFile"):
        text = f"{param} is no file; nothing is fetched from a URL"
    named = param is None or text.split(maxsplit=1)[0] == param
    return Answer(400, "invalid_value", text if named else f"{param}: {text}", param)
