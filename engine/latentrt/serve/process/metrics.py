"""Prometheus metrics, named as vLLM names its own; the scheduler's threads write some, the HTTP side the rest."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import copy
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.exposition import generate_latest

from latentrt.errors import LatentrtError
from latentrt.serve.core.observer import Observer
from latentrt.serve.process.frequent import Frequent

PREFIX = "latentrt_"
TAKEN = ("ok", "client_gone", "cancelled")  # however they ended, these were not refused
_WAITS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SIZES, _CLIENTS = 16, 32  # labels of their own
_LANES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


def refused(outcome: str, status: int) -> bool:
    """Return whether a request that ended so was refused."""
    return outcome not in TAKEN and (400 <= status < 500 or status == 503)


class Metrics(Observer):
    """All metrics of one server, in a registry of their own, as one of its models tells them.

    Args:
        model: its name for clients, a label of everything.
    """

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._families: dict[str, Any] = {}
        self._models: dict[str, Metrics] = {}
        self._bind(model)

    def of(self, model: str) -> Metrics:
        """Return the same metrics, in the same registry, of another model of this server."""
        if model not in self._models:
            copy(self)._bind(model)
        return self._models[model]

    def _bind(self, model: str) -> None:
        self._model = model
        self._models[model] = self
        self._requests = self._make(Counter, "requests", "Requests that ended, by how.", "route", "outcome")
        self._rejected = self._make(Counter, "request_rejected", "Requests that were refused, by reason.", "reason")
        self._latency = self._make(
            Histogram, "e2e_request_latency_seconds", "Whole requests for pictures.", buckets=_WAITS
        )
        self._queue = self._make(
            Histogram, "request_queue_time_seconds", "From a request's acceptance to its first step.", buckets=_WAITS
        )
        self._images = self._make(Counter, "images", "Pictures that ended, by how; done is good.", "outcome")
        self._by_size = self._bounded("images_by_size", "Finished pictures; rare sizes are other.", "size", _SIZES)
        self._by_client = self._bounded("images_by_client", "Finished pictures, by key.", "client", _CLIENTS)
        self._image_latency = self._make(
            Histogram, "e2e_image_latency_seconds", "From a picture's acceptance to its end.", buckets=_WAITS
        )
        self._step = self._make(Histogram, "step_seconds", "One step of all running pictures.", buckets=_STEPS)
        self._lanes = self._make(Histogram, "batch_size", "Lanes of a step; guidance takes two.", buckets=_LANES)
        self._stage = self._make(Histogram, "stage_seconds", "Work beside the steps.", "stage", buckets=_STEPS)
        self._jobs = self._make(Counter, "background_jobs", "Background jobs that ended, by how.", "outcome")
        self._forgotten = self._make(
            Counter, "background_results_dropped", "Jobs that are no longer kept, by why.", "reason"
        )
        self._webhooks = self._make(Counter, "webhooks", "Webhooks that ended, by how.", "outcome")
        self._faults = self._make(Counter, "engine_faults", "Faults of the engine, by kind.", "kind")
        self._loads = self._make(Counter, "model_loads", "Loads of the model while serving, by how.", "outcome")
        self._load = self._make(Histogram, "model_load_seconds", "One load of the model.", buckets=_WAITS)

    def gauge(self, name: str, help: str, read: Callable[[], float]) -> None:
        """Add a gauge that is read at each scrape."""
        self._make(Gauge, name, help).set_function(read)

    def gpu_memory(self, read: Callable[[], tuple[int, int]]) -> None:
        """Add gauges of a GPU's free bytes, and of all; NaN where the driver fails."""

        def part(index: int) -> float:
            try:
                return read()[index]
            except LatentrtError:
                return math.nan

        self.gauge("gpu_memory_free_bytes", "Free memory of the GPU.", lambda: part(0))
        self.gauge("gpu_memory_total_bytes", "Memory of the GPU.", lambda: part(1))

    async def text(self) -> bytes:
        """Return what a scrape gets: of all servers, where several stand behind one address."""
        return generate_latest(self.registry)

    def ended_request(self, route: str, outcome: str, status: int, seconds: float | None) -> None:
        """Count a request that is over; `seconds` where it was one for pictures that were made."""
        self._requests.labels(self._model, route, outcome).inc()
        if refused(outcome, status):
            self._rejected.labels(self._model, outcome).inc()
        if seconds is not None:
            self._latency.observe(seconds)

    def drew(self, pictures: int, size: str, client: str) -> None:
        """Count the finished pictures of a request that is over; the event loop alone calls this."""
        for (counter, names), name in ((self._by_size, size), (self._by_client, client)):
            label, dropped = names.label(name, pictures)
            if dropped is not None:
                counter.remove(self._model, dropped)
            counter.labels(self._model, label).inc(pictures)

    def ended_job(self, outcome: str, seconds: float) -> None:
        """Count a background job that is over, seconds after it came: "completed", or failed with an error's code."""
        self._jobs.labels(self._model, outcome).inc()
        if outcome == "completed":
            self._latency.observe(seconds)

    def forgot(self, reason: str) -> None:
        """Count a job that is no longer kept: "expired", "room" (for others) or "deleted"."""
        self._forgotten.labels(self._model, reason).inc()

    def sent(self, outcome: str) -> None:
        """Count a webhook that is over: "delivered", "failed" or "dropped"."""
        self._webhooks.labels(self._model, outcome).inc()

    def loaded(self, seconds: float | None) -> None:
        """Count a load of the model while the server serves; None: it failed."""
        self._loads.labels(self._model, "failed" if seconds is None else "done").inc()
        if seconds is not None:
            self._load.observe(seconds)

    # ---- What the scheduler tells

    def begun(self, waited: float) -> None:
        self._queue.observe(waited)

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        self._step.observe(seconds)
        self._lanes.observe(lanes)

    def staged(self, stage: str, seconds: float) -> None:
        self._stage.labels(self._model, stage).observe(seconds)

    def ended(self, outcome: str, seconds: float) -> None:
        self._images.labels(self._model, outcome).inc()
        self._image_latency.observe(seconds)

    def faulted(self, hung: bool) -> None:
        self._faults.labels(self._model, "hung" if hung else "raised").inc()

    def _bounded(self, name: str, help: str, label: str, most: int) -> tuple[Any, Frequent]:
        return self._make(Counter, name, help, label), Frequent(most)

    def _make(self, kind: Any, name: str, help: str, *labels: str, **options: Any) -> Any:
        """Return a metric whose first label is the model; bound to it at once where it is the only one."""
        metric = self._families.get(name)
        if metric is None:
            metric = kind(PREFIX + name, help, ("model_name", *labels), registry=self.registry, **options)
            self._families[name] = metric
        return metric if labels else metric.labels(self._model)
