"""The service: orders in, pictures out, by one engine that all share step by step.

Three threads belong to it: the engine's (`worker`), the one that encodes and decodes beside it on a CPU (`studio`),
and the one that looks at the clock (`clock`). What they share is on the `desk`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType

from latentrt.engine import Engine
from latentrt.errors import BackendError, RequestError
from latentrt.serve.core import stages
from latentrt.serve.core.clock import Clock
from latentrt.serve.core.curve import Curve, Shape
from latentrt.serve.core.desk import Desk
from latentrt.serve.core.forecast import Forecast
from latentrt.serve.core.observer import Observer, Silent
from latentrt.serve.core.queue import Part, Queue, sooner
from latentrt.serve.core.studio import Studio
from latentrt.serve.core.ticket import (
    DeadlineUnreachable,
    Draining,
    EngineFault,
    NotReady,
    Order,
    QueueFull,
    ServiceProblem,
    Ticket,
)
from latentrt.serve.core.worker import Worker

SOON = 1.0  # seconds; what is told to come again where nothing is known yet
NEWS = 0.1  # seconds for which one look at a full queue is good
PATIENCE = 0.5  # the part of queue_timeout after which an order without a deadline ranks before all newcomers


class Place:
    """Places in the queue for pictures of one order to come; a context manager that gives them back if unused."""

    def __init__(self, service: Service, pictures: int) -> None:
        self.pictures = pictures
        self._service = service
        self._open = True

    def submit(self, order: Order) -> Ticket:
        """Order the pictures; places that they do not need are given back, all of them where this raises.

        Raises:
            RequestError: the place was used or given back already, or has room for fewer pictures.
            Draining, NotReady: the service was closed, or the engine failed, meanwhile.
        """
        with self:
            room = self.pictures if self._open else 0
            if order.request.count > room:
                raise RequestError(
                    f"{order.request.count} pictures", needed=f"at most {room}", fix="reserve a place for them"
                )
            return self._service._submit(order, self)

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        self._service._release(self)

    def _take(self) -> int:
        """The places that are still held, once."""
        held, self._open = self.pictures if self._open else 0, False
        return held

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


class Service:
    """Serves an engine to many; any thread may call it. The service is ready once its first self-check has passed.

    Args:
        engine: resident, and used by nobody else from now on; it is not closed here.
        queue: pictures that may wait.
        run_timeout: seconds that a picture may take once it has lanes.
        queue_timeout: seconds that a picture may wait for them.
        hang: seconds after which a step that has not returned is taken to hang.
        observer: hears of everything.
        curve: what was measured (`latentrt.serve.core.curve.load`); None lets every tick have all lanes, and times are
            learnt while serving.

    Raises:
        BackendError: the engine drops its networks after use.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        queue: int = 64,
        run_timeout: float = 300,
        queue_timeout: float = 120,
        hang: float = 60,
        observer: Observer | None = None,
        curve: Curve | None = None,
    ) -> None:
        if not engine.resident:
            raise BackendError(
                "the engine drops its networks", needed="a resident one", fix="load it with resident=True"
            )
        self._engine = engine
        self._queue_timeout, self._hang = queue_timeout, hang
        self._caps = curve or Curve()
        self._curve = self._caps.copy()
        self._full: QueueFull | None = None  # what was found when it was last looked at
        self._full_since = 0.0
        self._desk = Desk(Queue(queue), observer or Silent())
        on_gpu = engine.backend.gpu is not None
        studio = Studio(self._desk, engine, orders=1, pictures=1) if on_gpu else Studio(self._desk, engine)
        worker = Worker(self._desk, engine, self._caps, self._curve, run_timeout, studio if on_gpu else None)
        runs: dict[str, Callable[[], None]] = {"engine": worker.run, "clock": Clock(self._desk, hang).run}
        if not on_gpu:
            runs["studio"] = studio.run
        self._threads = [
            threading.Thread(target=self._desk.survive, args=(run,), name=f"latentrt-{name}", daemon=True)
            for name, run in runs.items()
        ]
        for thread in self._threads:
            thread.start()

    # ---- Orders

    def reserve(
        self,
        pictures: int,
        *,
        rows: int,
        deadline: float | None,
        shape: Shape | None = None,
    ) -> Place:
        """Places in the queue, before anything of a request is decoded.

        Args:
            pictures: how many.
            rows: network calls of each, as good as steps.
            deadline: the `time.monotonic()` by which all must be done.
            shape: of their latents, (channels, height, width); the model's own if None.

        Raises:
            Draining, NotReady: nothing is taken now.
            QueueFull: there are not as many places.
            DeadlineUnreachable: by what is measured, they would be late.
        """
        desk = self._desk
        with desk.changed:
            try:
                self._refuse_if_unready()
                self._refuse_if_full(pictures)
                self._refuse_if_late(pictures, rows, deadline, shape)
            except ServiceProblem as problem:
                desk.observer.refused(problem.code, pictures)
                raise
            desk.queue.reserved += pictures
            return Place(self, pictures)

    def full(self, ahead: int = 0) -> QueueFull | None:
        """Why a request of which nothing is known yet would be refused: there is no place for any picture, if as many
        requests as are `ahead` get theirs first.

        So that a crowd costs little, this takes the lock for one of many of them.
        """
        if self._desk.queue.free > ahead or not self.ready:
            return None
        now = time.monotonic()
        if self._full is None or now - self._full_since > NEWS:
            with self._desk.changed:
                self._full, self._full_since = self._fullness(1, ahead), now
        if self._full is not None:
            self._desk.observer.refused(self._full.code, 1)
        return self._full

    def _submit(self, order: Order, place: Place) -> Ticket:
        desk, request, now = self._desk, order.request, time.monotonic()
        ticket = Ticket(order, desk.cancel)
        shape, lanes = stages.shape_of(self._engine, request), stages.lanes_of(request)
        due = sooner(now + PATIENCE * self._queue_timeout, order.deadline)
        limit = sooner(now + self._queue_timeout, order.deadline)
        parts = [Part(ticket, i, shape, lanes, request.steps, now, due, limit) for i in range(request.count)]
        with desk.changed:
            if desk.closed or desk.fault is not None:
                self._refuse_if_unready()
            desk.queue.reserved -= place._take()
            desk.add(ticket, parts)
            desk.observer.accepted(len(parts))
        return ticket

    def _release(self, place: Place) -> None:
        with self._desk.changed:
            self._desk.queue.reserved -= place._take()
            self._desk.now_idle()

    def _refuse_if_unready(self) -> None:
        if self.state == "draining":
            raise Draining("the service is ending", needed="one that runs", fix="send the request to another")
        if self.state != "ready":
            fault = self._desk.fault
            found = "the service starts" if fault is None else f"the engine failed ({fault.found})"
            raise NotReady(found, needed="a self-check that passes", fix="try again soon", retry_after=SOON)

    def _refuse_if_full(self, pictures: int) -> None:
        full = self._fullness(pictures)
        if full is not None:
            raise full

    def _fullness(self, pictures: int, ahead: int = 0) -> QueueFull | None:
        """Why there is no room for so many."""
        queue = self._desk.queue
        if pictures > queue.places:
            return QueueFull(
                f"{pictures} pictures", needed=f"at most {queue.places} at once", fix="order fewer pictures"
            )
        free = max(0, queue.free - ahead)
        if pictures <= free:
            return None
        seconds = self._forecast(self._own_shape(), queue.waiting).room(pictures - free)
        return QueueFull(
            f"{free} of {queue.places} places in the queue are free",
            needed=f"{pictures}",
            fix="try again later",
            retry_after=max(SOON, seconds or 0.0),
        )

    def _refuse_if_late(self, pictures: int, rows: int, deadline: float | None, shape: Shape | None) -> None:
        if deadline is None:
            return
        now, shape = time.monotonic(), shape or self._own_shape()
        due = sooner(now + PATIENCE * self._queue_timeout, deadline)
        ahead = [part for part in self._desk.queue.waiting if part.due <= due]
        needed = self._forecast(shape, ahead).done(pictures, rows)
        if needed is not None and now + needed > deadline:
            alone = Forecast((), (), self._caps, self._curve, shape, self._engine.denoiser.lanes).done(pictures, rows)
            helps = alone is not None and now + alone <= deadline
            raise DeadlineUnreachable(
                f"the pictures would be done in {needed:.1f} s",
                needed=f"in {max(0.0, deadline - now):.1f} s",
                fix="try again later" if helps else "allow more time, or take fewer steps",
                retry_after=max(SOON, now + needed - deadline) if helps else None,
            )

    def _forecast(self, shape: Shape, ahead: list[Part]) -> Forecast:
        return Forecast(self._desk.running, ahead, self._caps, self._curve, shape, self._engine.denoiser.lanes)

    def _own_shape(self) -> Shape:
        latents = self._engine.spec.latents
        return latents.channels, latents.height, latents.width

    # ---- State

    @property
    def state(self) -> str:
        """ "starting", "ready", "draining" or "failed"."""
        return self._desk.state

    @property
    def ready(self) -> bool:
        """Whether orders are taken."""
        return self.state == "ready"

    @property
    def waiting(self) -> int:
        """Pictures without lanes."""
        return len(self._desk.queue.waiting)

    @property
    def running(self) -> int:
        """Pictures that have lanes, or had them and are being decoded."""
        return len(self._desk.running)

    def self_check(self, timeout: float | None = None) -> None:
        """Have the engine prove itself between two ticks; wait until it has.

        Raises:
            EngineFault: it failed, or had no turn in time; the service is unready until one passes.
            Draining: the service was closed.
            LatentrtError: whatever the engine raised.
        """
        outcome: Future[None] = Future()
        with self._desk.changed:
            if self._desk.closed:
                self._refuse_if_unready()
            self._desk.asked.append(outcome)
            self._desk.changed.notify_all()
        try:
            outcome.result(self._hang if timeout is None else timeout)
        except TimeoutError as error:
            raise EngineFault(
                "the self-check had no turn in time", needed="an engine that answers", fix="wait"
            ) from error

    # ---- The end

    def drain(self) -> None:
        """Take nothing new; what has a place is finished."""
        with self._desk.changed:
            self._desk.draining = True
            self._desk.now_idle()

    async def wait_drained(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits, runs or has a place; whether that was so in time (seconds)."""
        try:
            async with asyncio.timeout(timeout):
                while True:
                    with self._desk.changed:
                        if self._desk.idle:
                            return True
                        news = self._desk.idle_waiters.add()
                    await news
        except TimeoutError:
            return False

    def close(self, timeout: float = 10.0) -> None:
        """End the threads after the tick that runs; what is left fails. Threads that hang are left behind."""
        self._desk.close()
        end = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> Service:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
