"""A scheduler without an engine: flat pictures, as fast and as badly as it is told; and servers around it."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import structlog
import uvicorn
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.errors import LatentrtError
from latentrt.images.picture import Picture
from latentrt.model.model import Model
from latentrt.request import Request
from latentrt.runtime.base import Facts
from latentrt.runtime.fake import FakeBackend
from latentrt.runtime.tensorrt.record import Profile
from latentrt.serve.core.handle import Handle, Stage
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.observer import Observer
from latentrt.serve.core.queue import Limits
from latentrt.serve.core.rules.budget import Budget
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http.app import create_app
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.process.config import Settings
from latentrt.serve.process.metrics import Metrics
from tests.support.serve.fake_engine import PATIENCE, SHAPE

ROWS = 4
EMOJI = Model(Bundle.open(check_hashes=False), FakeBackend())


def _drop(*_: Any) -> dict[str, Any]:
    raise structlog.DropEvent


structlog.configure(processors=[_drop])  # structlog.testing.capture_logs still captures everything


class FakeScheduler(Scheduler):
    """The real one, but a task of the event loop makes the pictures of a request.

    Attributes:
        delay: seconds a row takes.
        hold: rows after the first wait for it, if it is given.
        fails: what requests end in, instead of pictures.
        refuses: what `reserve` raises.
        cut: what the model does not read of a prompt.
        forced: the state, whatever it is.
        seen, submitted, cancelled: requests that were reserved, submitted, cancelled before they were over.
    """

    def __init__(
        self,
        *,
        queue: int = 64,
        delay: float = 0.0,
        hold: asyncio.Event | None = None,
        refuses: Exception | None = None,
        observer: Observer | None = None,
    ) -> None:
        super().__init__(16, SHAPE, Facts(), Limits(queue), Curve(), observer or Observer(), on_hang=lambda: None)
        self.places, self.delay, self.hold, self.refuses = queue, delay, hold, refuses
        self.fails: LatentrtError | None = None
        self.cut: dict[str, str] = {}
        self.forced = ""
        self.seen: list[Handle] = []
        self.submitted: list[Handle] = []
        self.cancelled: list[Handle] = []
        self.tasks: dict[Handle, asyncio.Task[None]] = {}
        self.checked(None)

    @property
    def state(self) -> str:
        return self.forced or super().state

    def fill(self) -> FakeScheduler:
        """Take all places of the queue, and those for clients that have none in it, until `empty`."""
        counts = {"one": self.places, "other": -(-self.places // 4)}
        self.filling = [Handle(Request(prompt="", count=n), SHAPE, 1, owner=owner) for owner, n in counts.items()]
        for handle in self.filling:
            super().reserve(handle)
        return self

    def empty(self) -> None:
        for handle in self.filling:
            super().release(handle)

    def reserve(self, handle: Handle) -> None:
        self.seen.append(handle)
        if self.refuses is not None:
            raise self.refuses
        super().reserve(handle)

    def submit(self, handle: Handle) -> None:
        super().submit(handle)
        self.submitted.append(handle)
        self.tasks[handle] = asyncio.get_running_loop().create_task(self._draw(handle))

    def stop(self, handle: Handle, *, waiting: bool = True) -> None:
        super().stop(handle, waiting=waiting)
        for slot in handle.slots:
            if slot.stops:
                self.finish(slot, picture(handle, slot.index))
        if handle.over and handle in self.tasks:
            self.tasks[handle].cancel()

    def fail(self, handle: Handle, error: LatentrtError) -> None:
        if not handle.over and handle in self.tasks:
            self.cancelled.append(handle)
            self.tasks[handle].cancel()
        super().fail(handle, error)

    async def _draw(self, handle: Handle) -> None:
        job: Any = SimpleNamespace(moved=0, latents=np.zeros(handle.shape, np.float32))
        handle.rows, handle.cut = ROWS, self.cut
        for row in range(1, ROWS + 1):
            await asyncio.sleep(self.delay)
            if self.hold is not None and row > 1:
                await self.hold.wait()
            job.moved = row
            for slot in (slot for slot in handle.slots if slot.stage < Stage.OVER):
                slot.job, slot.stage = job, Stage.RUNNING
                if row <= handle.previews:
                    self.show(slot, row - 1, picture(handle, slot.index))
            self.ticked(handle.slots, handle.lanes, self.delay)
        if self.fails is not None:
            del self.tasks[handle]
            return self.fail(handle, self.fails)
        for slot in handle.slots:
            self.finish(slot, picture(handle, slot.index))


def picture(handle: Handle, index: int) -> Picture:
    """Flat, in a colour that its seed chooses; on a given picture, that picture."""
    request = handle.request
    assert request.width is not None
    assert request.height is not None
    seed = request.seed + index
    pixels = np.full((request.height, request.width, 3), seed % 256, np.uint8)
    given = request.pictures.get("image", pixels)
    pixels = np.asarray(given.convert("RGB") if isinstance(given, Image.Image) else given)
    settings = {"prompt": request.prompt, "seed": seed, "solver": request.solver or "ddim", "steps": request.steps}
    return Picture.of(np.ascontiguousarray(pixels), {**settings, "guidance": request.guidance})


def catalog_of(
    model: Model = EMOJI,
    *,
    profiles: Sequence[Profile] | None = None,
    budget: Budget | None = None,
    **settings: Any,
) -> Catalog:
    """A model's, under these settings, with plans for these sizes."""
    return Catalog(model, profiles, Settings(**{"log_format": "json", **settings}), budget=budget)


def app_of(scheduler: FakeScheduler, /, model: Model = EMOJI, **settings: Any) -> Any:
    """The application around a fake scheduler; its metrics hear of it."""
    catalog = catalog_of(model, **settings)
    metrics = scheduler.observer if isinstance(scheduler.observer, Metrics) else Metrics(catalog.name)
    scheduler.observer = metrics
    return create_app(scheduler, catalog, metrics=metrics)


def png(width: int = 64, height: int = 64, mode: str = "RGB", colour: Any = None, kind: str = "PNG") -> bytes:
    """Return the bytes of a flat picture."""
    buffer = BytesIO()
    Image.new(mode, (width, height), colour or 0).save(buffer, kind)
    return buffer.getvalue()


def code_of(body: dict[str, Any]) -> Any:
    """Return the code of an error of either API."""
    return body["code"] if "code" in body else body["error"]["code"]


# httpx gives up after five seconds, which is not long on a machine that is busy.
get, post = (partial(ask, timeout=PATIENCE) for ask in (httpx.get, httpx.post))


async def until(check: Callable[[], object]) -> None:
    """Let the event loop turn until something is so."""
    async with asyncio.timeout(PATIENCE):
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
                ws="none",
                timeout_graceful_shutdown=1,
                # Clients on a busy machine come late.
                **{"lifespan": "off", "timeout_keep_alive": round(PATIENCE), **config},
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
