"""Errors as A1111 answers them: its fields and words, with the name of the field and our code beside them.

| field | of A1111 | here |
| --- | --- | --- |
| `error` | the exception's class | "HTTPException" |
| `detail` | what went wrong; a list of it where a body does not fit (422) | the same |
| `errors` | the exception as text | the same text |
| `body` | "" | "" |
| `param`, `code` | | the field that is refused, and the code that the Images API and metrics have |

Source: AUTOMATIC1111/stable-diffusion-webui, modules/api/api.py, 1.10.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from latentrt.serve.http.errors import Answer
from latentrt.serve.http.utf8 import Utf8Response

PREFIX = "/sdapi/", "/controlnet/"
_WORDS = {  # what A1111 says of it
    "invalid_api_key": "Incorrect username or password",
    "model_not_found": "Model not found",
    "image_decode_failed": "Invalid encoded image",
    "sampler_name": "Sampler not found",
    "hr_upscaler": "could not find upscaler",
    "upscaler_1": "could not find upscaler",
    "upscaler_2": "could not find upscaler",
    "refiner_checkpoint": "Could not find checkpoint",
    "script_name": "Script not found",
    "alwayson_scripts": "always on script not found",
}


class Error(BaseModel):
    """Every error."""

    error: str
    detail: str | list[dict[str, Any]]
    errors: str
    body: str
    param: str | None
    code: str | None


def response_to(answer: Answer, path: str) -> JSONResponse:
    """Return an error as the API of a path answers it."""
    if not path.startswith(PREFIX):
        return answer.response
    words = _WORDS.get(answer.code) or _WORDS.get(answer.param or "")
    message = f"{words}: {answer.message}" if words else answer.message
    detail: str | list[dict[str, Any]] = message
    if answer.misfit:
        where = ["body", *([answer.param] if answer.param else [])]
        detail = [{"type": answer.code, "loc": where, "msg": message}]
    known = {"error": "HTTPException", "detail": detail, "errors": message, "body": ""}
    body = {**known, "param": answer.param, "code": answer.code}
    return Utf8Response(body, 422 if answer.misfit else answer.status, answer.headers)
