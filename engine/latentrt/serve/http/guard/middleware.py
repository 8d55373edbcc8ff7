"""What every request passes before its route: keys, origins, limits, a full queue; timeouts; its log line.

ASGI, not Starlette's BaseHTTPMiddleware: streams pass through untouched, and a refusal comes before the body is read.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from contextlib import ExitStack
from typing import Any

from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.serve.core.rules.terms import Terms
from latentrt.serve.http.errors import Answer, Problem, answer_to, too_large
from latentrt.serve.http.guard.origins import foreign
from latentrt.serve.http.guard.record import POLLED, Record, route_of
from latentrt.serve.http.models.models import Models
from latentrt.serve.http.sdapi.answers import response_to
from latentrt.serve.process.config import Settings
from latentrt.serve.process.keys import Keys
from latentrt.serve.process.logs import logger

OPEN = ("/", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/favicon.ico")  # and all below /static/
# Every request to these takes places in the queue.
DRAWING = ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
ENLARGING = ("/sdapi/v1/extra-single-image", "/sdapi/v1/extra-batch-images")
BODIES = {  # the media type of each body that is read
    **dict.fromkeys((*DRAWING, *ENLARGING, "/sdapi/v1/options", "/sdapi/v1/png-info"), "application/json"),
    "/v1/images/edits": "multipart/form-data",
}
EDITING = ("/v1/images/edits", "/sdapi/v1/img2img", *ENLARGING, "/sdapi/v1/png-info")
CLIENT_GONE = 499  # nginx' number for it; only the log has it
PIECE = 2**20  # bytes of an answer
_TAIL = 1024  # bytes of a form in which it must end
_ID = re.compile(r"[!-~]{1,128}")


def most_bytes(settings: Settings, path: str) -> int:
    """Return the most bytes of a body: many only where pictures are sent, so that many requests fill no memory."""
    pictures = path in EDITING or (settings.takes_maps and path in DRAWING)
    return settings.max_body if pictures else settings.max_text


class Guard:
    """Refuses, bounds and logs requests around the application; only `origins.cross_origin` is further out."""

    def __init__(self, app: ASGIApp, *, keys: Keys, settings: Settings, models: Models, record: Record) -> None:
        self._app = app
        self._keys, self._settings = keys, settings
        self._models, self._record = models, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return self._record.flush()  # the server ends
        most = most_bytes(self._settings, scope["path"])
        exchange = _Exchange(scope, receive, send, self._settings)
        try:
            refusal = self._refusal(scope, exchange, most)
            if refusal is not None:
                await exchange.answer(refusal)
            else:
                await RequestBodyLimitMiddleware(self._app, most)(scope, exchange.receive, exchange.send)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            exchange.gone = True
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            exchange.facts["outcome"] = "engine_error"
            logger().exception("the server failed", id=exchange.facts["id"])
            if exchange.status is None:
                await exchange.answer(answer_to(error))
        finally:
            exchange.facts["held"].close()
            self._report(scope, exchange)

    def _refusal(self, scope: Scope, exchange: _Exchange, most: int) -> Answer | None:
        """Return why the body need not be read: who sends it, too many bytes, a full queue, another media type."""
        path, headers = scope["path"], exchange.headers
        stranger = self._stranger(scope, exchange)
        if stranger is not None:
            return stranger
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > most:
            return too_large(most)
        if scope["method"] != "POST" or path not in BODIES:
            return None
        owner = exchange.facts["owner"]
        refused = (self._models.full(owner) if path in DRAWING else None) or _wrong_media(headers, BODIES[path])
        return None if refused is None else answer_to(refused)

    def _stranger(self, scope: Scope, exchange: _Exchange) -> Answer | None:
        """Return why a client is not served; note whose the request is: a key's, or without keys an address's."""
        path, headers = scope["path"], exchange.headers
        if not self._keys:
            refused = foreign(scope["method"], headers, self._settings)
            exchange.facts["owner"] = (scope.get("client") or ("",))[0]
            return None if refused is None else answer_to(refused)
        if path in OPEN or path.startswith("/static/"):
            return None
        owner = self._keys.owner(headers.get("authorization", ""))
        if owner is None:
            message = "a key is needed: send it as `Authorization: Bearer KEY`"
            return Answer(401, "invalid_api_key", message, None, {"www-authenticate": "Bearer"})
        exchange.facts |= {"owner": owner, "terms": self._keys.terms(owner)}
        return None

    def _report(self, scope: Scope, exchange: _Exchange) -> None:
        status, outcome = exchange.end()
        route = route_of(scope, (*BODIES, *POLLED))
        self._record.ended(scope, route, status, outcome, exchange.began, exchange.facts)


class _Exchange:
    """One request on its way in and its answer on the way out.

    Attributes:
        facts: what the log's line says of it; routes add to them in `http.state.facts`. "held" is closed at its end.
        status: of the answer, once it has begun.
        gone: whether the client has left.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, settings: Settings) -> None:
        self._scope, self._receive, self._send = scope, receive, send
        self._body_timeout, self._stall_timeout = settings.body_timeout, settings.stall_timeout
        self._by_ray = settings.ray
        self.began = time.monotonic()
        self.headers = Headers(scope=scope)
        given = self.headers.get("x-request-id", "")
        id = given if _ID.fullmatch(given) else f"req_{random.getrandbits(96):024x}"
        self.facts: dict[str, Any] = {"id": id, "owner": "", "terms": Terms(), "held": ExitStack()}
        self.status: int | None = None
        self.gone = self._closed = self._body_read = self._left_unread = False
        self._form_end, self._last = _form_end(self.headers), b""
        scope.setdefault("state", {})["facts"] = self.facts

    async def receive(self) -> Message:
        """Return the next message. The body must come within a timeout; after it, only a disconnect can come.

        A form must have its end: Starlette takes one without for whole, and leaves the last file of it open.
        """
        if not self._body_read:
            try:
                async with asyncio.timeout(self.began + self._body_timeout - time.monotonic()):
                    message = await self._receive()
            except TimeoutError:
                late = f"the request's body did not come within {self._body_timeout:g} seconds"
                raise HTTPException(408, late, {"Connection": "close"}) from None
            self._body_read = not message.get("more_body", False)
            self._left_unread = message["type"] == "http.disconnect"  # frameworks take it for a malformed body
            if self._form_end:
                self._last = (self._last + message.get("body", b"")[-_TAIL:])[-_TAIL:]
                if self._body_read and not self._left_unread and self._form_end not in self._last:
                    raise HTTPException(400, "the form breaks off: its last boundary is missing")
        else:
            message = await self._receive()
        if message["type"] == "http.disconnect" and not self._closed:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on an answer, with the request's id. The client must take each piece within a timeout.

        A piece is sent once the one before was taken; an empty one follows the last, so that this is waited for too.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-content-type-options"] = "nosniff"
            if not self._by_ray:  # its proxy adds the same id
                headers["x-request-id"] = self.facts["id"]
        body = message.get("body", b"")
        for start in range(0, len(body), PIECE) if len(body) > PIECE // 16 else ():
            await self._pass_on({**message, "body": body[start : start + PIECE], "more_body": True})
            message = {**message, "body": b""}
        await self._pass_on(message)
        self._closed = message["type"] == "http.response.body" and not message.get("more_body", False)

    async def _pass_on(self, message: Message) -> None:
        try:
            async with asyncio.timeout(self._stall_timeout):
                await self._send(message)
        except TimeoutError:
            raise ClientDisconnect from None

    async def answer(self, answer: Answer) -> None:
        """Send a refusal."""
        self.facts["outcome"] = answer.code
        await response_to(answer, self._scope["path"])(self._scope, self._receive, self.send)

    def end(self) -> tuple[int, str]:
        """Return status and outcome for the log and the metrics."""
        outcome = self.facts.get("outcome")
        if self._left_unread or (outcome is None and self.gone and not self._closed):
            return CLIENT_GONE, "client_gone"
        status = self.status or CLIENT_GONE
        return status, outcome or ("ok" if status < 400 else "refused")


def _form_end(headers: Headers) -> bytes:
    """Return what ends a form: RFC 2046's close delimiter. Nothing where the body is none, or says no boundary."""
    kind, about = parse_options_header(headers.get("content-type"))
    boundary = about.get(b"boundary", b"") if kind == b"multipart/form-data" else b""
    return b"--" + boundary + b"--" if boundary else b""


def _wrong_media(headers: Headers, needed: str) -> Problem | None:
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == needed:
        return None
    found = f"the body's Content-Type is {kind[:100]!r}" if kind else "the body has no Content-Type"
    fix = f"send it with Content-Type: {needed}"
    return Problem(found, needed, fix, status=415, code="unsupported_media_type")
