"""OpenTelemetry spans of requests, made when they are over from what was noted of them; the extra `otel` sends them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers
from starlette.types import Scope

from latentrt import __version__
from latentrt.errors import MissingDependencyError
from latentrt.serve.core.handle import Handle
from latentrt.serve.process.config import Settings
from latentrt.serve.process.logs import logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OURS = "http/protobuf"
LAST_SPANS = 3.0  # seconds for them when the server ends


class Traces:
    """Makes a span of a request, below the one that its `traceparent` names, and one for each part of its work.

    Args:
        provider: of the spans; it decides which are kept, and where they go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api, self._propagator = trace, TraceContextTextMapPropagator()
        self._tracer = provider.get_tracer("latentrt", __version__)

    def request(
        self,
        scope: Scope,
        route: str,
        status: int,
        began: float,
        handle: Handle | None,
        told: Mapping[str, Any],
    ) -> None:
        """Make the spans of a request that ends now.

        Args:
            began: its `time.monotonic()`.
            handle: None where it had no place in the queue.
            told: what the log says of it.
        """
        now, method, headers = time.monotonic(), scope["method"], Headers(scope=scope)
        epoch = time.time() - now  # of time.monotonic()
        attributes = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
        span = self._tracer.start_span(
            f"{method} {route}",
            self._propagator.extract({name: headers[name] for name in self._propagator.fields if name in headers}),
            self._api.SpanKind.SERVER,
            {**attributes, **{f"latentrt.{name}": value for name, value in told.items()}},
            start_time=_nanoseconds(epoch + began),
        )
        if status >= 500:
            span.set_status(self._api.StatusCode.ERROR)
        inside = self._api.set_span_in_context(span)
        for name, picture, start, end in () if handle is None else (handle.queued(now), *handle.marks):
            which = {} if picture is None else {"latentrt.picture": picture}
            part = self._tracer.start_span(name, inside, attributes=which, start_time=_nanoseconds(epoch + start))
            part.end(_nanoseconds(epoch + end))
        span.end(_nanoseconds(epoch + now))


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)


@contextmanager
def tracing(settings: Settings) -> Iterator[Traces | None]:
    """Send spans by OTLP over HTTP, where a setting or OpenTelemetry's own variables say so; None where none does.

    Raises:
        MissingDependencyError: the setting does, and the extra `otel` is not installed.
    """
    if not _wanted(settings):
        yield None
        return
    try:
        provider = _provider(settings)
    except ImportError as error:
        missing = MissingDependencyError(
            f"the module {error.name} is not installed",
            needed="the extra `otel`, for traces",
            fix="pip install 'latentrt[otel]'",
        )
        if settings.otlp_endpoint:
            raise missing from error
        logger().warning("no traces are sent", error=str(missing))  # the variable may be set for other programs
        yield None
        return
    try:
        yield Traces(provider)
    finally:
        last = threading.Thread(target=provider.shutdown, daemon=True)  # it tries for long where no collector answers
        last.start()
        last.join(LAST_SPANS)


def _wanted(settings: Settings) -> bool:
    """Return whether traces are to be sent, and can be by this protocol."""
    if settings.otlp_endpoint:
        return True
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    if off or os.environ.get("OTEL_TRACES_EXPORTER") == "none" or not any(map(os.environ.get, ENDPOINTS)):
        return False
    protocol = next(filter(None, map(os.environ.get, PROTOCOLS)), OURS)
    if protocol != OURS:
        logger().warning("no traces are sent", protocol=protocol, needed=OURS, fix=f"{PROTOCOLS[0]}={OURS}")
    return protocol == OURS


def _provider(settings: Settings) -> TracerProvider:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create()
    if str(resource.attributes["service.name"]).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": "latentrt", "service.version": __version__}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    own = settings.otlp_endpoint
    exporter = OTLPSpanExporter(f"{own.rstrip('/')}/v1/traces") if own else OTLPSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
