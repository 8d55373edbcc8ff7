"""One connection, as uvicorn serves it, but with bounds that uvicorn does not have.

uvicorn waits for ever, until a request's head has come and until a client has taken what was sent to it, and keeps all
of both meanwhile. TCP's own timeout (see `engine.serve.server.listening`) ends a connection that takes nothing; one
that takes or sends a byte now and then is ended here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

SMALL = 2**12  # bytes that may wait for the next ones
ENOUGH = 2**20  # bytes of an answer that are progress
MOST_HEAD = 2**16  # bytes of a request's line and headers, and of what comes with their last piece


def patient(head: float, stall: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, which hangs up on a client that is too slow; what it ordered is then given up.

    Args:
        head: seconds in which the head of a request must have come, from the connection or its first byte on.
        stall: seconds in which a client must take a MiB of its answer, or what is left of it.
    """

    class Patient(HttpToolsProtocol):
        """Two timers: one runs while a head is awaited, one while more waits to be sent than should."""

        _head: asyncio.TimerHandle | None = None
        _stall: asyncio.TimerHandle | None = None
        _awaits_head = True
        _head_bytes = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(_Joining(transport))  # type: ignore[arg-type]
            self._head = _later(head, transport.abort)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._awaits_head = True

        def on_headers_complete(self) -> None:
            super().on_headers_complete()
            self._awaits_head = False

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if not self._awaits_head:
                self._forget_head()
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

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        held, self._held = self._held, b""
        if held:
            self._transport.write(held)


def _later(seconds: float, do: Callable[[], None]) -> asyncio.TimerHandle:
    return asyncio.get_running_loop().call_later(seconds, do)
