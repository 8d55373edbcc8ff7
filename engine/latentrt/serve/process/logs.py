"""Structured logs: JSON for machines, colours for a terminal."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import deque
from collections.abc import Callable
from typing import Any, TextIO

import structlog

from latentrt.serve.process.config import Settings

# What the libraries beneath have to say of every request is said once, by our own line.
_QUIET = ("uvicorn", "sse_starlette", "python_multipart", "asyncio", "PIL")
LATER, FEW = 0.2, 32  # seconds that a line may wait, and how many of that time do not


# Tracebacks are plain: pretty ones show the values of variables, and prompts are among them.
def configure(settings: Settings, stream: TextIO | None = None) -> None:
    """Send all logs, those of the libraries too, to one stream in one form; standard error if none is given."""
    stream = sys.stderr if stream is None else stream
    as_json = settings.log_format == "json" or (settings.log_format == "auto" and not stream.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if as_json
        else [structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback)]
    )
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(settings.log_level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of every malformed body


class Lines:
    """Writes lines about requests: a few at once, those of a crowd a moment later, for others wait for their answers
    and a line costs as much as an answer. To be used in one event loop.
    """

    def __init__(self) -> None:
        self._since = 0.0
        self._count = 0
        self._late: deque[Callable[[], None]] = deque()

    def add(self, write: Callable[[], None]) -> None:
        """Call it now, or LATER seconds from now."""
        now = time.monotonic()
        if now - self._since > LATER:
            self._since, self._count = now, 0
        self._count += 1
        if self._count <= FEW and not self._late:
            write()
            return
        if not self._late:
            asyncio.get_running_loop().call_later(LATER, self._write_some)
        self._late.append(write)

    def _write_some(self) -> None:
        """A few in each turn of the loop."""
        for _ in range(min(FEW, len(self._late))):
            self._late.popleft()()
        if self._late:
            asyncio.get_running_loop().call_soon(self._write_some)


def logger() -> Any:
    """The server's own logger."""
    return structlog.stdlib.get_logger("latentrt.serve")
