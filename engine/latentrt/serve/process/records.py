"""What is kept of every request: a count in the metrics and a line in the log, so that both tell the same story."""

from __future__ import annotations

from functools import partial
from typing import Any

from latentrt.serve.process.logs import Lines, logger
from latentrt.serve.process.metrics import Metrics

_QUIET_ROUTES = ("/health/live", "/health/ready", "/metrics")


class Records:
    """Hears how each request ended; to be used in one event loop."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._lines = Lines()

    def ended(self, method: str, route: str, status: int, outcome: str, seconds: float, facts: dict[str, Any]) -> None:
        """A request is over; the facts of one whose pictures were planned say how many ("n")."""
        if route not in _QUIET_ROUTES:
            drawn = "n" in facts and outcome == "ok"
            self._metrics.ended_request(route, outcome, status, seconds if drawn else None)
        told = {key: value for key, value in facts.items() if key not in ("owner", "outcome")}
        line = {"route": route, "status": status, "outcome": outcome, "seconds": round(seconds, 4), **told}
        self._lines.add(partial(_write, method, line))


def _write(method: str, line: dict[str, Any]) -> None:
    write = logger().debug if line["route"] in _QUIET_ROUTES else logger().info
    write("request", method=method, **line)
