"""What is told of requests that ended: counts for the metrics, and lines of the log that no crowd can flood."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from starlette.types import Scope

from latentrt.serve.process.keys import label_of
from latentrt.serve.process.logs import logger
from latentrt.serve.process.metrics import Metrics, refused
from latentrt.serve.process.traces import Traces

UNCOUNTED = ("/health/live", "/health/ready", "/metrics")
POLLED = (  # by pages and clients, while they are open or wait
    *("/latentrt/queue", "/sdapi/v1/progress"),
    *("/v1/images/jobs", "/v1/images/jobs/{job}", "/v1/images/jobs/{job}/preview"),
)
STATIC = "/static"
SECOND = 1.0  # in which one refusal of a kind has a line of its own
_UNTOLD = ("owner", "terms", "outcome", "handle", "held")


def route_of(scope: Scope, known: tuple[str, ...]) -> str:
    """Return the route of a request for logs and metrics: of a bounded number, whatever paths clients try.

    Args:
        known: paths that may be refused before they are routed.
    """
    path = scope["path"]
    if path.startswith(f"{STATIC}/"):
        return STATIC
    template = getattr(scope.get("route"), "path", "")  # without its router's prefix
    if "{" in template:
        return str(template)
    return path if template or path in known else "unknown"


class Record:
    """Counts requests and writes their lines, so that metrics and log agree.

    A second's first refusal of a route, status and outcome has its line; the others of that second are counted in one
    line at its end (`flush`), and written singly at the level debug. So are health, metrics, polling and the page's
    files.
    """

    def __init__(self, metrics: Metrics, traces: Traces | None) -> None:
        self._metrics, self._traces = metrics, traces
        self._more: Counter[tuple[str, int, str]] = Counter()  # refusals of this second, but for the first of each
        self._timer: asyncio.TimerHandle | None = None

    def ended(
        self, scope: Scope, route: str, status: int, outcome: str, began: float, facts: Mapping[str, Any]
    ) -> None:
        """Count a request that ends now, write its line, make its spans.

        Args:
            began: its `time.monotonic()`.
            facts: what the routes noted of it.
        """
        seconds = time.monotonic() - began
        metrics = self._of(facts)
        line = {"method": scope["method"], "route": route, "status": status, "outcome": outcome}
        told = _told(facts, seconds)
        if route not in UNCOUNTED:
            drawn = "n" in facts and outcome == "ok" and "job" not in facts
            metrics.ended_request(route, outcome, status, seconds if drawn else None)
        if facts.get("done") and "job" not in facts:
            metrics.drew(facts["done"], facts["size"], told.get("client", "unknown"))
        quiet = route in UNCOUNTED or (route in (*POLLED, STATIC) and status < 500)
        if self._traces is not None and not quiet and "job" not in facts:
            self._traces.request(scope, route, status, began, facts.get("handle"), {"outcome": outcome, **told})
        if not quiet and refused(outcome, status):
            quiet = self._counted((route, status, outcome))
        write = logger().debug if quiet else logger().info
        write("request", **line, **told)

    def ended_job(self, scope: Scope, outcome: str, facts: Mapping[str, Any]) -> None:
        """Count a background job that is over, write its line, make the spans of the request that ordered it.

        Args:
            scope: of that request.
            outcome: "completed", or an error's code.
            facts: what was noted of it.
        """
        handle = facts["handle"]
        seconds = time.monotonic() - handle.came
        told, metrics = _told(facts, seconds), self._of(facts)
        metrics.ended_job(outcome, seconds)
        if facts["done"]:
            metrics.drew(facts["done"], facts["size"], told.get("client", "unknown"))
        if self._traces is not None:
            self._traces.request(scope, scope["path"], 202, handle.came, handle, {"outcome": outcome, **told})
        logger().info("job", outcome=outcome, **told)

    def _of(self, facts: Mapping[str, Any]) -> Metrics:
        """Return the metrics of a request's model."""
        return self._metrics.of(facts["model"]) if "model" in facts else self._metrics

    def _counted(self, kind: tuple[str, int, str]) -> bool:
        """Return whether this second had such a refusal before; count it then."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(SECOND, self.flush)
        before = kind in self._more
        self._more[kind] += before  # the first counts 0
        return before

    def flush(self) -> None:
        """Write the counts of the second that is over, or of its part before the server ends."""
        if self._timer is not None:
            self._timer.cancel()
        more, self._more, self._timer = self._more, Counter(), None
        for (route, status, outcome), count in more.items():
            if count:
                logger().info("refusals", route=route, status=status, outcome=outcome, count=count)


def _told(facts: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Return what a line says of a request, beside how it ended."""
    told = {"seconds": round(seconds, 4)} | {name: value for name, value in facts.items() if name not in _UNTOLD}
    return told | ({"client": label_of(facts["owner"])} if facts["owner"] else {})
