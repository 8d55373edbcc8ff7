"""Errors as HTTP: a status, a body in OpenAI's shape, headers for retries; and how routes document them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from latentrt.errors import LatentrtError, RequestError, ScheduleError, UnknownSolverError
from latentrt.serve.core.errors import ServiceError
from latentrt.serve.http.utf8 import Utf8Response


class Problem(RequestError):  # noqa: N818 - as RFC 9457 calls it
    """A refusal that knows its status, code and the parameter it is about.

    Args:
        found, needed, fix: as of every LatentrtError.
        param: the request's field, by the name that the client used.
        status: of HTTP.
        code: for machines, as "invalid_value".
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


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorDetail


@dataclass(frozen=True, slots=True)
class Answer:
    """An error as HTTP."""

    status: int
    code: str
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    misfit: bool = False  # whether the body does not fit its description

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's shape."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The same as a response."""
        return Utf8Response(self.body, self.status, self.headers)


STORAGE = "insufficient_storage"  # as WebDAV calls it
_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_STATUS = {  # of the service's own errors, by their code
    "queue_full": 429,
    "quota_exceeded": 429,
    "deadline_unreachable": 429,
    "not_ready": 503,
    "draining": 503,
    "model_loading": 503,
    "model_failed": 503,
    "queue_timeout": 504,
    "run_timeout": 504,
    "cancelled": 409,
}
# A request that was interrupted or took too long would end the same way again, and cost as much.
_NO_RETRY = {409, 504}
_OF_STATUS = {404: "not_found", 405: "method_not_allowed", 408: "body_timeout", 413: "body_too_large"}
_MEANING = {
    400: "invalid_value, unsupported_size, beyond_memory or image_decode_failed; `param` names the field",
    401: "invalid_api_key",
    404: "model_not_found, not_found or no_preview",
    408: "body_timeout",
    409: "cancelled, by the client or by another request of the same key; not_finished or model_in_use",
    413: "body_too_large or image_too_large",
    415: "unsupported_media_type",
    422: "invalid_value: the body does not fit its description",
    429: "queue_full, quota_exceeded or deadline_unreachable; see Retry-After",
    500: "engine_error",
    503: "not_ready, draining, model_loading or model_failed, see Retry-After; or insufficient_storage",
    504: "queue_timeout or run_timeout",
}


_OTHER_NAMES = {  # of other APIs, for the Images API's own
    "steps": "num_inference_steps",
    **dict.fromkeys(("cfg_scale", "guidance"), "guidance_scale"),
    **dict.fromkeys(("sampler", "sampler_name", "solver"), "scheduler"),
    **dict.fromkeys(("negative", "negativePrompt"), "negative_prompt"),
    **dict.fromkeys(("width", "height"), "size"),
    **dict.fromkeys(("num_images", "batch_size"), "n"),
    "denoising_strength": "strength",
    "image_guidance_scale": "image_guidance",
}


def documented(*statuses: int, model: type[BaseModel] = ErrorResponse) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of routes that may answer with these statuses; all have one shape."""
    known: dict[int | str, dict[str, Any]] = {
        status: {"model": model, "description": _MEANING[status]} for status in statuses
    }
    # "default" also keeps FastAPI from documenting a 422 of its own, which no route answers.
    return {**known, "default": {"model": model, "description": "Any other error."}}


def answer_to(error: BaseException) -> Answer:
    """Return the answer to an error; one that is not latentrt's own is an engine_error without details."""
    if isinstance(error, Problem):
        headers = {"x-should-retry": "false"} if error.status in _NO_RETRY else {}
        return Answer(error.status, error.code, str(error), error.param, headers)
    if isinstance(error, ServiceError) and error.code in _STATUS:
        status, headers = _STATUS[error.code], {}
        if error.retry_after is not None and math.isfinite(error.retry_after):
            headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        if status in _NO_RETRY:
            headers["x-should-retry"] = "false"
        return Answer(status, error.code, str(error), None, headers)
    if isinstance(error, RequestError | ScheduleError):
        of_solver = isinstance(error, UnknownSolverError | ScheduleError)
        return Answer(400, "invalid_value", str(error), "scheduler" if of_solver else None)
    if isinstance(error, LatentrtError):
        return Answer(500, "engine_error", str(error))
    return Answer(500, "engine_error", "the engine failed; the log has the details under this request's x-request-id")


def too_large(most_bytes: int) -> Answer:
    """Return the answer to a body that is too large."""
    return Answer(413, "body_too_large", f"the request is too large; at most {most_bytes} bytes are read")


def answer_to_status(status: int, detail: str, headers: dict[str, str] | None = None) -> Answer:
    """Return the answer where the framework refused: no such path, no such method, a broken body."""
    code = _OF_STATUS.get(status, "invalid_value" if status < 500 else "engine_error")
    message = "there is no such path; /openapi.json lists them" if detail == "Not Found" else detail
    return Answer(status, code, message, None, headers or {})


def answer_to_validation(errors: Any) -> Answer:
    """Return the answer with pydantic's first error. What was sent is not repeated: it may be a prompt, or long."""
    first = errors[0]
    where = [str(part) for part in first["loc"] if part not in ("body", "query", "path")]
    param = where[0] if where and first["type"] != "json_invalid" else None
    text = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        text = "the body is no JSON"
    elif first["type"] == "extra_forbidden":
        ours = _OTHER_NAMES.get(param or "")
        text = f"{param} is not a parameter here" + (f"; did you mean {ours}?" if ours else "")
    elif first["type"] == "missing":
        text = f"{param or 'the body'} is missing"
    elif first["type"] == "none_required":
        text = f"{param} is not supported"
    elif text.startswith("Expected UploadFile"):
        text = f"{param} is no file; nothing is fetched from a URL"
    named = param is None or text.split(maxsplit=1)[0] == param
    return Answer(400, "invalid_value", text if named else f"{param}: {text}", param, misfit=True)
