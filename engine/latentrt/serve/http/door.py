"""The door: who need not come in, for want of a key, a place in the queue, or a body that can be read.

Whoever wants pictures hears it where the head of a request is parsed (`connection.py`), before there is a
task or a body: refusals of a crowd cost little, and come before the work of those who got the last places. What comes
by another way, as under Ray, hears the same from `gate.py`.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from starlette.responses import JSONResponse

from latentrt.errors import LatentrtError
from latentrt.serve.http.connection import Refusal
from latentrt.serve.http.problems import Answer, answer_to
from latentrt.serve.process.records import Records

OPEN = ("/", "/health/live", "/health/ready", "/metrics", "/openapi.json", "/favicon.ico")
OPEN_BELOW = "/static/"
# Where every request takes places in the queue.
DRAWING = ("/v1/images/generations", "/v1/images/edits", "/sdapi/v1/txt2img", "/sdapi/v1/img2img")
EDITING = ("/v1/images/edits", "/sdapi/v1/img2img")
_ID = re.compile(r"[!-~]{1,128}")
_AHEAD = "ahead"
COURTESY = 0.05  # seconds


class Door:
    """Decides from the head of a request alone.

    Args:
        keys: one of these is needed, if there are any.
        most_bytes: of a body, by its path.
        full: why nothing can be drawn for anybody now, if so many others are drawn for first; None where something can.
        records: hear of those who are refused at once.
        cross_origin: pages of elsewhere may ask; their refusals need headers that are added further in.
    """

    def __init__(
        self,
        *,
        keys: tuple[bytes, ...],
        most_bytes: Callable[[str], int],
        full: Callable[[int], LatentrtError | None],
        records: Records,
        cross_origin: bool,
    ) -> None:
        self._keys = keys
        self._most_bytes = most_bytes
        self._full = full
        self._records = records
        self._cross_origin = cross_origin
        self._came = self._ahead = 0
        # The same to all of a crowd.
        self._told: tuple[LatentrtError | None, Answer | None] = None, None
        self._sent: tuple[Answer | None, JSONResponse | None] = None, None

    def at_once(
        self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]], state: dict[str, Any]
    ) -> Refusal | None:
        """The whole answer to a request for pictures that is refused. None for all others: they go in, and count as
        `ahead` of whoever comes now until they do (see `enter`).

        Args:
            path: as it was sent; a request that spells it in another way is left to the gate.
        """
        if method != "POST" or path not in DRAWING:
            return None
        began, sent = time.monotonic(), decoded(headers)
        if self._cross_origin and b"origin" in sent:
            return None
        self._came += 1
        facts = facts_of(sent)
        try:
            answer = self.refusal(method, path, sent, facts, self._ahead)
        except Exception:  # the gate meets it again, and says what there is to say
            return None
        if answer is None:
            self._ahead += 1
            state[_AHEAD] = True
            return None
        if answer is not self._sent[0]:
            self._sent = answer, JSONResponse(answer.body, answer.status, answer.headers)
        response = self._sent[1]
        assert response is not None
        self._records.ended(method, path, answer.status, answer.code, time.monotonic() - began, facts)
        own = [(name.encode(), value.encode()) for name, value in own_headers(facts["id"]).items()]
        return Refusal(answer.status, [*response.raw_headers, *own], bytes(response.body))

    async def enter(self, state: dict[str, Any]) -> None:
        """A request's task runs: from here on it takes its places without a pause, or waits for its client.

        While others come it lets them have their answers first, for a moment at most: those cost a tenth of its own.
        """
        if not state.pop(_AHEAD, False):
            return
        try:
            came, until = -1, time.monotonic() + COURTESY
            while came != self._came and time.monotonic() < until:
                came = self._came
                for _ in range(2):  # what arrived meanwhile is seen in the turn after this
                    await asyncio.sleep(0)
        finally:
            self._ahead -= 1

    def refusal(
        self, method: str, path: str, headers: Mapping[bytes, str], facts: dict[str, Any], ahead: int = 0
    ) -> Answer | None:
        """Why the body need not be read; the owner of a key that fits is added to the facts."""
        if self._keys and path not in OPEN and not path.startswith(OPEN_BELOW):
            owner = _owner(self._keys, headers.get(b"authorization", ""))
            if owner is None:
                message = "a key is needed: send it as `Authorization: Bearer KEY`"
                return Answer(401, "invalid_api_key", message, None, {"www-authenticate": "Bearer"})
            facts["owner"] = owner
        length = headers.get(b"content-length", "")
        if length.isdecimal() and int(length[:20]) > self._most_bytes(path):
            return too_much(self._most_bytes(path))
        full = self._full(ahead) if path in DRAWING and method == "POST" else None
        if full is not self._told[0]:
            self._told = full, None if full is None else answer_to(full)
        return self._told[1]


def decoded(headers: Iterable[tuple[bytes, bytes]]) -> dict[bytes, str]:
    """A request's headers, by their names in small letters."""
    return {name: value.decode("latin-1") for name, value in headers}


def facts_of(headers: Mapping[bytes, str]) -> dict[str, Any]:
    """What is known of a request from the start.

    Its id is the client's own, if it is one that a log can hold; else a new one. Ids are no secrets: what is would be
    asked of the system, and every such call lets the engine's threads go first.
    """
    given = headers.get(b"x-request-id", "")
    return {"id": given if _ID.fullmatch(given) else f"req_{random.getrandbits(96):024x}", "owner": ""}


def own_headers(id: str) -> dict[str, str]:
    """What every answer has."""
    return {"x-request-id": id, "x-content-type-options": "nosniff"}


def too_much(most_bytes: int) -> Answer:
    """413."""
    return Answer(413, "body_too_large", f"the request is too large; at most {most_bytes} bytes are read")


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
