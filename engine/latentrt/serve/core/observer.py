"""What the service tells of itself while it works: one call for each thing that happens, for metrics and logs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

from latentrt.errors import LatentrtError

LOG = logging.getLogger(__name__)


class Observer(Protocol):
    """Called by the service's threads, between ticks: be quick and do not wait. What a method raises is logged."""

    def accepted(self, pictures: int) -> None:
        """An order of so many pictures was taken."""

    def refused(self, code: str, pictures: int) -> None:
        """Pictures were refused before they had a place: "queue_full", "deadline_unreachable", ..."""

    def admitted(self, waited: float) -> None:
        """A picture has lanes now, that many seconds after it was accepted."""

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        """All running pictures moved by a row; `lanes` of the network were used."""

    def staged(self, stage: str, seconds: float, count: int) -> None:
        """A stage beside the ticks served `count` at once: "prepare" (orders), "decode" or "preview" (pictures)."""

    def ended(self, outcome: str, seconds: float) -> None:
        """A picture is "done" or failed with an error's code, that many seconds after it was accepted."""

    def faulted(self, error: LatentrtError, hung: bool) -> None:
        """The engine raised or hung; the service is unready until a self-check passes.

        A thread that hangs cannot be ended: where `hung` is true and the process shall not wait for it, end the
        process (and let whoever supervises it start another).
        """


class Silent:
    """An observer that does not care."""

    def accepted(self, pictures: int) -> None:
        """Nothing."""

    def refused(self, code: str, pictures: int) -> None:
        """Nothing."""

    def admitted(self, waited: float) -> None:
        """Nothing."""

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        """Nothing."""

    def staged(self, stage: str, seconds: float, count: int) -> None:
        """Nothing."""

    def ended(self, outcome: str, seconds: float) -> None:
        """Nothing."""

    def faulted(self, error: LatentrtError, hung: bool) -> None:
        """Nothing."""


class Guarded:
    """Passes every call on, and logs what it raises: an observer's fault never reaches the service."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer

    def __getattr__(self, name: str) -> Callable[..., None]:
        method = getattr(self._observer, name)

        def guarded(*arguments: Any) -> None:
            try:
                method(*arguments)
            except Exception:
                LOG.exception("the observer's %s raised", name)

        return guarded
