"""A service without an engine: it draws flat pictures, with the delays and faults of its settings."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
import structlog
import uvicorn
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.errors import LatentrtError
from latentrt.images.picture import Picture as Drawn
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.schedule import Schedule
from latentrt.serve.core.ticket import (
    Cancelled,
    Cut,
    Draining,
    Failed,
    NotReady,
    Order,
    Picture,
    Preview,
    Progress,
    QueueFull,
    Started,
    Ticket,
)
from latentrt.serve.http.app import create_app
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.process.config import Settings

ROWS = 4


def _drop(*_: Any) -> dict[str, Any]:
    raise structlog.DropEvent


structlog.configure(processors=[_drop])  # structlog.testing.capture_logs still captures everything


class FakePlace:
    """A reservation of places."""

    def __init__(self, service: FakeService, pictures: int) -> None:
        self._service, self.pictures, self.open = service, pictures, True

    def submit(self, order: Order) -> Ticket:
        self.open = False
        return self._service.submit(order, self.pictures)

    def release(self) -> None:
        if self.open:
            self.open = False
            self._service.reserved -= self.pictures

    def __enter__(self) -> FakePlace:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@dataclass
class FakeService:
    """A service as HTTP sees it.

    Attributes:
        delay: seconds a row takes.
        hold: an event that rows wait for, if given.
        fail: the error that the pictures end in, instead.
        refuse: the error that `reserve` raises.
        cut: the dropped end of a prompt.
    """

    queue: int = 64
    delay: float = 0.0
    hold: asyncio.Event | None = None
    fail: LatentrtError | None = None
    refuse: LatentrtError | None = None
    cut: Cut | None = None
    state: str = "ready"
    reserved: int = 0
    waiting: int = 0
    running: int = 0
    orders: list[Order] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    reservations: list[dict[str, Any]] = field(default_factory=list)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @property
    def ready(self) -> bool:
        return self.state == "ready"

    def reserve(
        self, pictures: int, *, rows: int, deadline: float | None, shape: tuple[int, int, int] | None = None
    ) -> FakePlace:
        self.reservations.append({"pictures": pictures, "rows": rows, "deadline": deadline, "shape": shape})
        if self.refuse is not None:
            raise self.refuse
        if self.state == "draining":
            raise Draining("the service is ending", needed="one that runs", fix="send the request to another")
        if self.state != "ready":
            raise NotReady("the service starts", needed="a self-check", fix="try again soon", retry_after=1.0)
        if self.reserved + pictures > self.queue:
            raise QueueFull("no place is free", needed="some", fix="try again later", retry_after=2.5)
        self.reserved += pictures
        return FakePlace(self, pictures)

    def full(self, ahead: int = 0) -> QueueFull | None:
        if self.reserved + ahead < self.queue or not self.ready:
            return None
        return QueueFull("no place is free", needed="some", fix="try again later", retry_after=2.5)

    def submit(self, order: Order, places: int) -> Ticket:
        self.orders.append(order)
        ticket = Ticket(order, self._cancel)
        task = asyncio.get_running_loop().create_task(self._draw(ticket, places))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        ticket.task = task
        return ticket

    def drain(self) -> None:
        self.state = "draining"

    async def wait_drained(self, timeout: float | None = None) -> bool:
        if self.tasks:
            _, left = await asyncio.wait(self.tasks, timeout=timeout)
            return not left
        return True

    def _cancel(self, ticket: Ticket) -> None:
        if not ticket.task.done():
            self.cancelled.append(ticket.id)
            ticket.tell(Failed(None, Cancelled("the order was cancelled", needed="none", fix="order again")), last=True)
            ticket.task.cancel()

    async def _draw(self, ticket: Ticket, places: int) -> None:
        order, request = ticket.order, ticket.order.request
        try:
            for row in range(1, ROWS + 1):
                await asyncio.sleep(self.delay)
                if self.hold is not None and row > 1:
                    await self.hold.wait()
                if row == 1 and self.cut is not None:
                    ticket.tell(self.cut)
                if row == 1:
                    self.running += request.count
                    ticket.tell(Started())
                for index in range(request.count):
                    ticket.tell(Progress(index, row, ROWS))
                    if row <= order.previews:
                        ticket.tell(Preview(index, row - 1, picture(order, index)))
            if self.fail is not None:
                ticket.tell(Failed(None, self.fail), last=True)
                return
            for index in range(request.count):
                ticket.tell(Picture(index, picture(order, index)), last=index == request.count - 1)
        finally:
            self.running = 0
            self.reserved -= places


def picture(order: Order, index: int) -> Drawn:
    """Return a flat picture, in a colour that its seed chooses; on a given picture, that picture."""
    request = order.request
    assert request.width is not None
    assert request.height is not None
    seed = request.seed + index
    pixels = np.full((request.height, request.width, 3), seed % 256, np.uint8)
    if order.image is not None:
        pixels = order.image
    settings = {"prompt": request.prompt, "seed": seed, "solver": request.solver or "ddim", "steps": request.steps}
    return Drawn.of(np.ascontiguousarray(pixels), {**settings, "guidance": request.guidance})


def catalog_of(*, profiles: Sequence[Profile] | None = None, **settings: Any) -> Catalog:
    """Return the embedded model's catalog, under these settings, with plans for these sizes."""
    bundle = Bundle.open(check_hashes=False)
    schedule = Schedule.from_config(bundle.json(bundle.spec.schedule))
    return Catalog(bundle.spec, schedule, Settings(**{"log_format": "json", **settings}), profiles)


def app_of(service: FakeService, **settings: Any) -> Any:
    """Return the application around a fake service."""
    return create_app(service, catalog_of(**settings))  # type: ignore[arg-type]


def png(width: int = 64, height: int = 64, mode: str = "RGB", colour: Any = None, kind: str = "PNG") -> bytes:
    """Return the bytes of a flat picture."""
    buffer = BytesIO()
    Image.new(mode, (width, height), colour or 0).save(buffer, kind)
    return buffer.getvalue()


Check = Callable[[], bool]


async def until(check: Check) -> None:
    """Run the event loop until the check holds; the tests' own time limit ends a check that never does."""
    while not check():
        await asyncio.sleep(0.001)


@contextmanager
def live(app: Any, **config: Any) -> Iterator[str]:
    """Serve the application on a free port; yield its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                log_config=None,
                lifespan="off",
                ws="none",
                timeout_graceful_shutdown=1,
                **config,
            )
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.005)
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
