"""What every request passes before a route sees it: its id, its key, the size and pace of its body; and its log line.

ASGI, not Starlette's BaseHTTPMiddleware: streams pass through untouched, and a refusal comes before the body is read.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import LatentrtError
from engine.serve.config import Settings
from engine.serve.logs import Lines, logger
from engine.serve.metrics import Metrics
from engine.serve.problems import Answer, answer_to

OPEN = ("/", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/favicon.ico")
OPEN_BELOW = "/static/"
CLIENT_GONE = 499  # nginx' number for it; it is seen in the log alone
# Where every request takes places in the queue.
DRAWING = ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
EDITING = ("/v1/images/edits", "/sdapi/v1/img2img")
_ID = re.compile(r"[!-~]{1,128}")
_QUIET_ROUTES = ("/health/live", "/health/ready", "/metrics")


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
        keys: one of these is needed, if there are any.
        most_bytes: of a body, by its path.
        body_timeout: seconds in which a body must come.
        full: why nothing can be drawn for anybody now; None where something can. Then nothing of a request is read: a
            crowd of refusals holds nobody up.
        metrics: hear of every request.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        keys: tuple[bytes, ...],
        most_bytes: Callable[[str], int],
        body_timeout: float,
        full: Callable[[], LatentrtError | None],
        metrics: Metrics,
    ) -> None:
        self._app = app
        self._keys = keys
        self._most_bytes = most_bytes
        self._body_timeout = body_timeout
        self._full = full
        self._told: tuple[LatentrtError | None, Answer | None] = None, None  # the same to all of a crowd
        self._metrics = metrics
        self._lines = Lines()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        passage = _Passage(scope, receive, send, _id_of(headers), self._body_timeout)
        refusal = self._refusal(scope, headers, passage.facts)
        try:
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

    def _refusal(self, scope: Scope, headers: Mapping[bytes, str], facts: dict[str, Any]) -> Answer | None:
        """Why the body need not be read."""
        path = scope["path"]
        if self._keys and path not in OPEN and not path.startswith(OPEN_BELOW):
            owner = _owner(self._keys, headers.get(b"authorization", ""))
            if owner is None:
                message = "a key is needed: send it as `Authorization: Bearer KEY`"
                return Answer(401, "invalid_api_key", message, None, {"www-authenticate": "Bearer"})
            facts["owner"] = owner
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most_bytes(path):
            return too_much(self._most_bytes(path))
        full = self._full() if path in DRAWING and scope["method"] == "POST" else None
        if full is not self._told[0]:
            self._told = full, None if full is None else answer_to(full)
        return self._told[1]

    def _report(self, passage: _Passage) -> None:
        facts, seconds = passage.facts, time.monotonic() - passage.began
        status, outcome = passage.end()
        path = passage.scope["path"]
        route = getattr(passage.scope.get("route"), "path", None) or (path if path in DRAWING else "unknown")
        told = {key: value for key, value in facts.items() if key not in ("owner", "outcome")}
        drawn = "n" in facts and outcome == "ok"
        if path not in _QUIET_ROUTES:
            self._metrics.ended_request(route, outcome, status, seconds if drawn else None)
        line = {"route": route, "status": status, "outcome": outcome, "seconds": round(seconds, 4), **told}
        write = logger().debug if path in _QUIET_ROUTES else logger().info
        self._lines.add(partial(write, "request", method=passage.scope["method"], **line))


@dataclass(slots=True)
class _Passage:
    """One request on its way in and its answer on the way out."""

    scope: Scope
    inner_receive: Receive
    inner_send: Send
    id: str
    body_timeout: float
    began: float = field(default_factory=time.monotonic)
    status: int | None = None
    gone: bool = False
    closed: bool = False
    body_read: bool = False
    facts: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.facts = {"id": self.id, "owner": ""}
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
            headers["x-request-id"] = self.id
            headers["x-content-type-options"] = "nosniff"
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
        if outcome is None and self.gone and not self.closed:
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


def too_much(most_bytes: int) -> Answer:
    """413."""
    return Answer(413, "body_too_large", f"the request is too large; at most {most_bytes} bytes are read")


def _id_of(headers: Mapping[bytes, str]) -> str:
    """The client's own id, if it is one that a log can hold; else a new one.

    Ids are no secrets. What is would be asked of the system, and every such call lets the engine's threads go first.
    """
    given = headers.get(b"x-request-id", "")
    return given if _ID.fullmatch(given) else f"req_{random.getrandbits(96):024x}"


def _owner(keys: tuple[bytes, ...], authorization: str) -> str | None:
    """A stable name of the key that was sent, or None; how long it takes does not tell which key came close.

    A1111's clients send Basic: the key may stand there alone, as the password, or with its user as "user:password".
    """
    scheme, _, credentials = authorization.partition(" ")
    tries = [credentials.strip().encode()]
    if scheme.lower() == "basic":
        tries = _of_basic(credentials.strip())
    elif scheme.lower() != "bearer":
        return None
    found = None
    for index, key in enumerate(keys):
        for attempt in tries:
            if hmac.compare_digest(key, attempt):
                found = f"key-{index}"
    return found


def _of_basic(credentials: str) -> list[bytes]:
    try:
        pair = base64.b64decode(credentials, validate=True)
    except ValueError:
        return []
    return [pair, pair.partition(b":")[2]]
