"""What every request passes before a route sees it: the door's questions, the pace of its body; and its log line.

ASGI, not Starlette's BaseHTTPMiddleware: streams pass through untouched, and a refusal comes before the body is read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from latentrt.serve.http.door import DRAWING, EDITING, Door, decoded, facts_of, own_headers
from latentrt.serve.http.problems import Answer, answer_to
from latentrt.serve.process.config import Settings
from latentrt.serve.process.logs import logger
from latentrt.serve.process.records import Records

CLIENT_GONE = 499  # nginx' number for it; it is seen in the log alone


def cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """What lets pages of these origins use the server from a browser; nothing where there are none.

    It stands around the gate: a browser asks leave without a key, and reads refusals too.
    """
    if not origins:
        return []
    told = ("x-request-id", "retry-after", "x-should-retry")
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=told,
        )
    ]


class Gate:
    """Around the application; only `cross_origin` is further out.

    Args:
        door: says who is refused.
        records: hear of every request.
        body_timeout: seconds in which a body must come.
    """

    def __init__(self, app: ASGIApp, *, door: Door, records: Records, body_timeout: float) -> None:
        self._app = app
        self._door = door
        self._records = records
        self._body_timeout = body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = decoded(scope["headers"])
        passage = _Passage(scope, receive, send, facts_of(headers), self._body_timeout)
        try:
            await self._door.enter(scope["state"])
            refusal = self._door.refusal(scope["method"], scope["path"], headers, passage.facts)
            if refusal is not None:
                await passage.answer(refusal)
            else:
                await self._app(scope, passage.receive, passage.send)
        except (ClientDisconnect, asyncio.CancelledError) as error:
            passage.gone = True
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            passage.facts["outcome"] = "engine_error"
            logger().exception("the server failed", id=passage.facts["id"])
            if passage.status is None:
                await passage.answer(answer_to(error))
        finally:
            self._report(passage)

    def _report(self, passage: _Passage) -> None:
        status, outcome = passage.end()
        path = passage.scope["path"]
        route = getattr(passage.scope.get("route"), "path", None) or (path if path in DRAWING else "unknown")
        seconds = time.monotonic() - passage.began
        self._records.ended(passage.scope["method"], route, status, outcome, seconds, passage.facts)


@dataclass(slots=True)
class _Passage:
    """One request on its way in and its answer on the way out."""

    scope: Scope
    inner_receive: Receive
    inner_send: Send
    facts: dict[str, Any]
    body_timeout: float
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    gone: bool = False
    closed: bool = False
    body_read: bool = False
    left_unread: bool = False  # frameworks take it for a malformed body

    def __post_init__(self) -> None:
        self.scope.setdefault("state", {})["facts"] = self.facts

    async def receive(self) -> Message:
        """The body has a time in which to come; after it, only a disconnect can."""
        if self.body_read:
            return self._noted(await self.inner_receive())
        try:
            async with asyncio.timeout(self.began + self.body_timeout - time.monotonic()):
                message = await self.inner_receive()
        except TimeoutError:
            late = f"the request's body did not come within {self.body_timeout:g} seconds"
            raise HTTPException(408, late, {"Connection": "close"}) from None
        self.body_read = not message.get("more_body", False)
        self.left_unread = message["type"] == "http.disconnect"
        return self._noted(message)

    def _noted(self, message: Message) -> Message:
        if message["type"] == "http.disconnect" and not self.closed:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        """Pass on, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers.update(own_headers(self.facts["id"]))
        elif not message.get("more_body", False):
            self.closed = True
        await self.inner_send(message)

    async def answer(self, answer: Answer) -> None:
        """Refuse."""
        self.facts["outcome"] = answer.code
        response = JSONResponse(answer.body, answer.status, answer.headers)
        await response(self.scope, self.inner_receive, self.send)

    def end(self) -> tuple[int, str]:
        """Status and outcome, as the log and the metrics tell them."""
        outcome = self.facts.get("outcome")
        if self.left_unread or (outcome is None and self.gone and not self.closed):
            return CLIENT_GONE, "client_gone"
        status = self.status or CLIENT_GONE
        return status, outcome or ("ok" if status < 400 else "refused")


class Bounded:
    """Counts what comes of bodies that do not say their size, by path as the gate does."""

    def __init__(self, app: ASGIApp, *, most_bytes: Callable[[str], int]) -> None:
        self._app = app
        self._most_bytes = most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await RequestBodyLimitMiddleware(self._app, self._most_bytes(scope.get("path", "")))(scope, receive, send)


def most_bytes(settings: Settings, path: str) -> int:
    """Of a body: many only where pictures are sent, so that a crowd of large ones fills no memory."""
    return settings.max_body if path in EDITING else settings.max_text
