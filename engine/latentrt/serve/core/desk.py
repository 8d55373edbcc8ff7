"""The books of the service: what waits, runs and is over, and whether the engine is well.

Every thread reads and writes them under `changed`, held for moments only: `reserve` is called by an event loop.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError
from latentrt.serve.core.observer import Guarded, Observer
from latentrt.serve.core.queue import Part, Queue
from latentrt.serve.core.ticket import (
    Cancelled,
    Draining,
    EngineFault,
    Event,
    Failed,
    Picture,
    QueueTimeout,
    RunTimeout,
    Ticket,
    Waiters,
)

LOG = logging.getLogger(__name__)
CHECK_AGAIN = 10.0  # seconds after a self-check that failed


class Desk:
    """What the service's threads share.

    Attributes:
        changed: guards everything here; notified when somebody may have something to do.
        orders: the pictures of each order that is not over.
        queue: pictures without lanes.
        running: pictures that have lanes, or had them and wait for the VAE.
        denoised: those that wait for the VAE, oldest first.
        sketches: of running pictures, the newest preview that waits for the VAE: its number and latents.
        fault: why the engine is not trusted; None where it is.
        checked: whether a self-check has ever passed.
        check_at: when the next self-check is due; None where none is.
        asked: who waits for the next self-check's outcome.
        busy: what the engine does right now, and since when.
        hung: those things that have taken too long.
    """

    def __init__(self, queue: Queue, observer: Observer) -> None:
        self.changed = threading.Condition()
        self.queue = queue
        self.observer = Guarded(observer)
        self.running: dict[Part, None] = {}
        self.denoised: deque[Part] = deque()
        self.sketches: dict[Part, tuple[int, NDArray[np.float32]]] = {}
        self.orders: dict[Ticket, list[Part]] = {}
        self.fault: EngineFault | None = None
        self.checked = False
        self.check_at: float | None = 0.0
        self.asked: list[Future[None]] = []
        self.busy: dict[str, float] = {}
        self.hung: set[str] = set()
        self.draining = False
        self.closed = False
        self.idle_waiters = Waiters()

    # ---- Orders

    def add(self, ticket: Ticket, parts: list[Part]) -> None:
        """Take an order."""
        with self.changed:
            self.orders[ticket] = parts
            self.queue.add(parts)
            self.changed.notify_all()

    def tell(self, part: Part, event: Event) -> None:
        """An event of a picture that is not over."""
        with self.changed:
            if not part.ended:
                part.ticket.tell(event)

    def end(self, part: Part, event: Picture | Failed) -> None:
        """The last event of a picture, the first time that it comes."""
        with self.changed:
            if not part.ended:
                self._forget(part, outcome_of(event))
                part.ticket.tell(event, last=part.ticket not in self.orders)

    def fail(self, ticket: Ticket, error: LatentrtError) -> None:
        """All pictures of an order that are not over fail."""
        with self.changed:
            open_parts = [part for part in self.orders.get(ticket, ()) if not part.ended]
            for part in open_parts:
                self._forget(part, outcome_of(Failed(None, error)))
            if open_parts:
                ticket.tell(Failed(None, error), last=True)

    def cancel(self, ticket: Ticket) -> None:
        """See `Ticket.cancel`."""
        self.fail(
            ticket, Cancelled("the order was cancelled", needed="an order that somebody waits for", fix="order again")
        )

    def fail_all(self, error: LatentrtError) -> None:
        """Every order fails."""
        with self.changed:
            for ticket in list(self.orders):
                self.fail(ticket, error)

    def _forget(self, part: Part, outcome: str) -> None:
        part.ended = True
        self.queue.discard(part)
        self.running.pop(part, None)
        self.sketches.pop(part, None)
        if all(other.ended for other in self.orders[part.ticket]):
            del self.orders[part.ticket]
        self.observer.ended(outcome, time.monotonic() - part.accepted)
        self.now_idle()
        self.changed.notify_all()

    def expire(self, now: float) -> None:
        """Pictures whose time is over fail."""
        with self.changed:
            for part in [part for part in (*self.queue.waiting, *self.running) if part.limit <= now]:
                self.end(part, Failed(part.index, _too_late(part, now)))

    @property
    def idle(self) -> bool:
        """Whether no order is left, and no place is promised to one."""
        return not self.orders and not self.queue.reserved

    def now_idle(self) -> None:
        """Wake who waits for that, if it is so."""
        if self.idle:
            self.idle_waiters.wake()

    # ---- Whether the engine is well

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining" or "failed"."""
        if self.draining or self.closed:
            return "draining"
        if self.fault is not None:
            return "failed"
        return "ready" if self.checked else "starting"

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Around everything that may hang."""
        with self.changed:
            self.busy[what] = time.monotonic()
        try:
            yield
        finally:
            with self.changed:
                del self.busy[what]
                if what in self.hung:
                    self.hung.remove(what)
                    self.changed.notify_all()

    def suspect(self, error: LatentrtError, *, hung: bool = False) -> None:
        """The engine raised or hung: nothing new begins until a self-check has passed.

        Said before the order that it cost fails: who hears of that finds the service unready, not about to be.
        """
        with self.changed:
            if self.fault is None:
                self.fault = _fault(error)
            self.check_at = 0.0
            self.observer.faulted(error, hung)
            self.changed.notify_all()

    def find_hung(self, now: float, longest: float) -> None:
        """What takes too long is a fault, and nobody waits for it any more."""
        with self.changed:
            for what, since in self.busy.items():
                if now - since > longest and what not in self.hung:
                    self.hung.add(what)
                    error = EngineFault(
                        f"the engine's {what} has not returned for {now - since:.1f} s",
                        needed=f"{longest:g} s",
                        fix="order again",
                    )
                    self.suspect(error, hung=True)
                    self.fail_all(error)

    @property
    def trusted(self) -> bool:
        """Whether pictures may begin: no self-check has to be made first."""
        return self.check_at is None and not self.asked

    def until_check(self) -> float | None:
        """Seconds until the next self-check; None where none is to be made. While something hangs, none can be."""
        if self.trusted or self.hung:
            return None
        return 0.0 if self.asked or self.check_at is None else max(0.0, self.check_at - time.monotonic())

    def was_checked(self, error: LatentrtError | None, asked: list[Future[None]]) -> None:
        """The outcome of a self-check that was asked for by these."""
        with self.changed:
            if error is None:
                self.checked, self.fault, self.check_at = True, None, None
            else:
                self.fault = _fault(error)
                self.check_at = time.monotonic() + CHECK_AGAIN
                self.fail_all(self.fault)
            self.changed.notify_all()
        for future in asked:
            if error is None:
                future.set_result(None)
            else:
                future.set_exception(error)

    def survive(self, run: Callable[[], None]) -> None:
        """Run a thread's function until it returns. What it raises is our own mistake: it costs the orders there are,
        and a self-check, and the thread goes on.
        """
        while True:
            try:
                return run()
            except Exception as error:
                LOG.exception("%s raised", threading.current_thread().name)
                fault = _fault(as_error(error))
                with self.changed:
                    self.suspect(fault)
                    self.fail_all(fault)

    def close(self) -> None:
        """End the threads; what is left fails."""
        stopped = Draining("the service was stopped", needed="a service that runs", fix="order again")
        with self.changed:
            self.closed = True
            self.fail_all(stopped)
            asked, self.asked = self.asked, []
            self.changed.notify_all()
        for future in asked:
            future.set_exception(stopped)


def outcome_of(event: Picture | Failed) -> str:
    """How a picture ended, as metrics have it."""
    return "done" if isinstance(event, Picture) else str(getattr(event.error, "code", type(event.error).__name__))


def as_error(error: Exception) -> LatentrtError:
    """What clients are told of something that was raised."""
    if isinstance(error, LatentrtError):
        return error
    fault = EngineFault(
        f"the engine raised {error!r}", needed="none of its errors", fix="report it with the server's log"
    )
    fault.__cause__ = error
    return fault


def _fault(error: LatentrtError) -> EngineFault:
    if isinstance(error, EngineFault):
        return error
    fault = EngineFault(error.found, needed=error.needed, fix=error.fix)
    fault.__cause__ = error
    return fault


def _too_late(part: Part, now: float) -> LatentrtError:
    seconds = f"{now - part.accepted:.1f} s after the order came"
    if part.admitted is None:
        return QueueTimeout(f"the picture has not begun {seconds}", needed="a shorter queue", fix="order again later")
    return RunTimeout(f"the picture is not done {seconds}", needed="a smaller or shorter one", fix="take fewer steps")
