"""Prometheus metrics, named as vLLM names its own; the service's threads write some of them, the HTTP side the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from latentrt.errors import LatentrtError

PREFIX = "latentrt:"
CONTENT_TYPE = CONTENT_TYPE_LATEST
TAKEN = ("ok", "client_gone", "cancelled")  # however they ended, these were not refused
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_LANES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


class Metrics:
    """All metrics of one server, in a registry of their own. An `latentrt.serve.core.observer.Observer`.

    Args:
        model: its name for clients, a label of everything.
        on_hang: called from the service's thread when a step hangs.
    """

    def __init__(self, model: str, on_hang: Callable[[], None] = lambda: None) -> None:
        self._on_hang = on_hang
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._model = model
        self._requests = self._make(Counter, "requests", "Requests that ended, by how.", "route", "outcome")
        self._rejected = self._make(Counter, "request_rejected", "Requests that were refused, by reason.", "reason")
        self._latency = self._make(
            Histogram, "e2e_request_latency_seconds", "Whole requests for pictures.", buckets=_WAITS
        )
        self._queue = self._make(
            Histogram, "request_queue_time_seconds", "From a request's acceptance to its first step.", buckets=_WAITS
        )
        self._images = self._make(Counter, "images", "Pictures that ended, by how; done is good.", "outcome")
        self._image_latency = self._make(
            Histogram, "e2e_image_latency_seconds", "From a picture's acceptance to its end.", buckets=_WAITS
        )
        self._step = self._make(Histogram, "step_seconds", "One step of all running pictures.", buckets=_STEPS)
        self._lanes = self._make(Histogram, "batch_size", "Lanes of a step; guidance takes two.", buckets=_LANES)
        self._stage = self._make(Histogram, "stage_seconds", "Work beside the steps.", "stage", buckets=_STEPS)
        self._faults = self._make(Counter, "engine_faults", "Faults of the engine, by kind.", "kind")

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """A gauge that is read when somebody asks."""
        self._make(Gauge, name, help).set_function(read)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)

    async def whole_text(self) -> bytes:
        """What a scrape gets; of all servers, where several stand behind one address."""
        return self.text()

    def ended_request(self, route: str, outcome: str, status: int, seconds: float | None) -> None:
        """A request is over; `seconds` where it was one for pictures that were made."""
        self._requests.labels(self._model, route, outcome).inc()
        if outcome not in TAKEN and (400 <= status < 500 or status == 503):
            self._rejected.labels(self._model, outcome).inc()
        if seconds is not None:
            self._latency.observe(seconds)

    def begun(self, waited: float) -> None:
        """A request's first step ran, that many seconds after it was accepted."""
        self._queue.observe(waited)

    def accepted(self, pictures: int) -> None:
        """Of Observer: the gauges show these."""

    def refused(self, code: str, pictures: int) -> None:
        """Of Observer: refusals are counted where they become answers."""

    def admitted(self, waited: float) -> None:
        """Of Observer: a request's wait is measured to its first step."""

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        """Of Observer."""
        self._step.observe(seconds)
        self._lanes.observe(lanes)

    def staged(self, stage: str, seconds: float, count: int) -> None:
        """Of Observer."""
        self._stage.labels(self._model, stage).observe(seconds)

    def ended(self, outcome: str, seconds: float) -> None:
        """Of Observer."""
        self._images.labels(self._model, outcome).inc()
        self._image_latency.observe(seconds)

    def faulted(self, error: LatentrtError, hung: bool) -> None:
        """Of Observer."""
        self._faults.labels(self._model, "hung" if hung else "raised").inc()
        if hung:
            self._on_hang()

    def _make(self, kind: Any, name: str, help: str, *labels: str, **options: Any) -> Any:
        """A metric whose first label is the model; bound to it at once where it is the only one."""
        metric = kind(PREFIX + name, help, ("model_name", *labels), registry=self.registry, **options)
        return metric if labels else metric.labels(self._model)
