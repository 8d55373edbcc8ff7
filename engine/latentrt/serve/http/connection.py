"""One connection, as uvicorn serves it, but with bounds that uvicorn does not have.

uvicorn waits for ever, until a request's head has come and until a client has taken what was sent to it, and keeps all
of both meanwhile. TCP's own timeout (see `latentrt.serve.server.listening`) ends a connection that takes nothing; one
that takes or sends a byte now and then is ended here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

SMALL = 2**12  # bytes that may wait for the next ones
ENOUGH = 2**20  # bytes of an answer that are progress
MOST_HEAD = 2**16  # bytes of a request's line and headers, and of what comes with their last piece


class Refusal(NamedTuple):
    """A whole answer, with its length and type among the headers."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


Refuse = Callable[[str, str, Iterable[tuple[bytes, bytes]], dict[str, Any]], Refusal | None]


def patient(head: float, stall: float, refuse: Refuse = lambda *_: None) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which hangs up on a client that is too slow; what it ordered is then given up.

    Args:
        head: seconds in which the head of a request must have come, from the connection or its first byte on.
        stall: seconds in which a client must take a MiB of its answer, or what is left of it.
        refuse: from a request's method, target, headers and ASGI state: the answer, where the application is not asked.
    """

    class Patient(HttpToolsProtocol):
        """Two timers: one runs while a head is awaited, one while more waits to be sent than should."""

        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _awaits_head = True
        _head_bytes = 0
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            self._joining = _Joining(transport)
            super().connection_made(self._joining)  # type: ignore[arg-type]
            self._head = _later(head, transport.abort)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._awaits_head = True

        def on_headers_complete(self) -> None:
            self._awaits_head = False
            self._unset_keepalive_if_required()  # of a refusal in the same read
            if self.cycle is _ANSWERED and self.transport.is_closing():
                return
            if self._may_refuse():
                method, target = self.parser.get_method().decode("ascii"), self.url.decode("latin-1")
                refusal = refuse(method, target, self.headers, self.scope["state"])
                if refusal is not None:
                    return self._refuse(refusal)
            super().on_headers_complete()

        def _may_refuse(self) -> bool:
            """Not before the answers of those ahead, not to who takes none, and once in a read: others wait too."""
            free = self.cycle is None or self.cycle.response_complete
            return free and not self._refused and not self.flow.write_paused

        def _refuse(self, refusal: Refusal) -> None:
            self._refused = True
            headers = [*self.server_state.default_headers, *refusal.headers]
            kept = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
            if not kept:
                headers.append((b"connection", b"close"))
            lines = [name + b": " + value + b"\r\n" for name, value in headers]
            self.cycle = _ANSWERED
            self._joining.send(b"".join([STATUS_LINE[refusal.status], *lines, b"\r\n", refusal.body]))
            if not kept:
                self.transport.close()
            self.on_response_complete()

        def data_received(self, data: bytes) -> None:
            self._refused = False
            super().data_received(data)
            if not self._awaits_head:
                self._forget_head()
                self._await_next()
            else:
                self._head = self._head or _later(head, self.transport.abort)
                self._head_bytes += len(data)
                if self._head_bytes > MOST_HEAD:
                    self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch()

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget_stall()

        def connection_lost(self, exc: Exception | None) -> None:
            self._forget_head()
            self._forget_stall()
            super().connection_lost(exc)

        def _watch(self) -> None:
            """Nothing is added meanwhile: uvicorn writes no more until what waits is taken."""
            waits = self.transport.get_write_buffer_size()
            self._stall = _later(stall, lambda: self._look(waits))

        def _look(self, waited: int) -> None:
            if waited - self.transport.get_write_buffer_size() < ENOUGH:
                self.transport.abort()
            else:
                self._watch()

        def _await_next(self) -> None:
            """Where a body follows its answer, uvicorn has forgotten how long a connection may idle."""
            idle = self.cycle is not None and self.cycle.response_complete and not self.transport.is_closing()
            if idle and self.timeout_keep_alive_task is None:
                self.timeout_keep_alive_task = _later(self.timeout_keep_alive, self.timeout_keep_alive_handler)

        def _forget_head(self) -> None:
            self._head_bytes = 0
            if self._head is not None:
                self._head.cancel()
                self._head = None

        def _forget_stall(self) -> None:
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

    return Patient


class _Answered:
    """What uvicorn asks of a request whose body it may drop."""

    response_complete = True
    message_event = asyncio.Event()


_ANSWERED: Any = _Answered()


class _Joining:
    """A transport that sends a small piece with the next one, or in the loop's next turn where none comes: uvicorn
    writes the head of an answer and its body apart, and sending is what costs most in a crowd.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        held, self._held = self._held, b""
        if held or len(data) > SMALL:
            self._transport.write(held + data)
        else:
            self._held = data
            asyncio.get_running_loop().call_soon(self._flush)

    def send(self, data: bytes) -> None:
        """What nothing follows: at once."""
        self._flush()
        self._transport.write(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._transport.write(held)


def _later(seconds: float, do: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, do)
