"""Structured logs: JSON for machines, colours for a terminal."""

from __future__ import annotations

import logging
import sys
from typing import Any, TextIO

import structlog

from latentrt.serve.process.config import Settings

# Our own line says all there is to say of a request. uvicorn logs an error where an answer is abandoned, and
# python_multipart warns of every malformed body.
_LEVELS = {"uvicorn": "CRITICAL", "python_multipart": "CRITICAL"} | dict.fromkeys(
    ("sse_starlette", "asyncio", "PIL"), "WARNING"
)


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
    for name, level in _LEVELS.items():
        logging.getLogger(name).setLevel(level)


def logger() -> Any:
    """Return the server's own logger."""
    return structlog.stdlib.get_logger("latentrt.serve")
