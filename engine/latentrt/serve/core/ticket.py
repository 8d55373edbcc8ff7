"""What a client orders, what it hears of it, and the ways in which the service says no.

The engine's threads speak to asyncio here and nowhere else: `Ticket.tell` may be called by any thread, and whoever
iterates the ticket is woken in its own event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import LatentrtError
from latentrt.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image

    from latentrt.images.picture import Picture as Drawn


@dataclass(frozen=True, slots=True)
class Order:
    """What one HTTP request wants.

    Attributes:
        request: `count` is the number of pictures.
        model: the bundle's name, aliases resolved.
        previews: partial images to deliver of each picture, spread over its rows; fewer come where decoding, or
            whoever listens, lags.
        deadline: the `time.monotonic()` by which all must be done.
        image: (H, W, 3) uint8, where the pictures begin on a given one.
        mask: (H, W) uint8, 255 where that one is repainted.
        strength: how much of the run is made on a given picture, above 0 to 1.
        id: the client's or the server's x-request-id.
    """

    request: Request
    model: str = ""
    previews: int = 0
    deadline: float | None = None
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.uint8] | None = None
    strength: float = 0.8
    id: str = ""


SHOWN = 200  # characters of a text in a message


@dataclass(frozen=True, slots=True)
class Cut:
    """A text of the request is longer than the model reads; `field` is its name there. Nothing else is wrong."""

    field: str
    dropped: str

    @property
    def message(self) -> str:
        """For whoever wrote the text."""
        shown = self.dropped if len(self.dropped) <= SHOWN else f"{self.dropped[:SHOWN]}..."
        return f"{self.field} is longer than the model reads; it did not read: {shown}"


@dataclass(frozen=True, slots=True)
class Started:
    """The first row of the first picture has run."""


@dataclass(frozen=True, slots=True)
class Progress:
    """`row` of `rows` rows of a picture have run."""

    index: int
    row: int
    rows: int


@dataclass(frozen=True, slots=True)
class Preview:
    """What a picture would be if it ended here; `number` counts from 0 and skips those that were dropped."""

    index: int
    number: int
    image: Image


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture is done."""

    index: int
    image: Drawn


@dataclass(frozen=True, slots=True)
class Failed:
    """A picture will not come; `index` None means none of those that have not come yet will."""

    index: int | None
    error: LatentrtError


Event = Cut | Started | Progress | Preview | Picture | Failed


class ServiceProblem(LatentrtError):  # noqa: N818 - what a service answers is not always an error
    """Base of the service's own answers.

    Attributes:
        code: the name that clients see.
        retry_after: seconds after which the same request is likely to be taken; None where waiting does not help.
    """

    code: ClassVar[str] = "engine_error"

    def __init__(self, found: str, needed: str, fix: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(found, needed, fix)
        self.retry_after = retry_after


class QueueFull(ServiceProblem):
    """There are not as many places in the queue as pictures are wanted."""

    code = "queue_full"


class DeadlineUnreachable(ServiceProblem):
    """By what is measured, the pictures cannot be done in time."""

    code = "deadline_unreachable"


class NotReady(ServiceProblem):
    """The service starts, or an engine fault has not been cleared by a self-check."""

    code = "not_ready"


class Draining(ServiceProblem):
    """The service is ending and takes nothing new."""

    code = "draining"


class QueueTimeout(ServiceProblem):
    """A picture waited too long for its turn."""

    code = "queue_timeout"


class RunTimeout(ServiceProblem):
    """A picture took too long once it had begun."""

    code = "run_timeout"


class Cancelled(ServiceProblem):
    """Whoever ordered the pictures does not want them any more."""

    code = "cancelled"


class EngineFault(ServiceProblem):
    """The engine raised what it should not, or hung; `__cause__` has what it raised."""

    code = "engine_error"


class Waiters:
    """Tasks that wait, each in its own event loop, until any thread wakes them. Its owner's lock guards it."""

    def __init__(self) -> None:
        self._futures: list[asyncio.Future[None]] = []

    def add(self) -> asyncio.Future[None]:
        """A future of the running loop; await it after the lock is let go."""
        future = asyncio.get_running_loop().create_future()
        self._futures = [*(known for known in self._futures if not known.done()), future]
        return future

    def wake(self) -> None:
        """Wake them all; those whose loop is closed are forgotten."""
        for future in self._futures:
            with suppress(RuntimeError):
                future.get_loop().call_soon_threadsafe(_resolve, future)
        self._futures.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


class Ticket:
    """What stands for an order until its last picture has come: an asynchronous iterator of events, each heard once.

    >>> async for event in service.reserve(1, rows=20, deadline=None).submit(order):
    ...     ...
    """

    def __init__(self, order: Order, cancel: Callable[[Ticket], None]) -> None:
        self.order = order
        self.id = order.id
        self.begun = False  # whether its first row has run
        self._cancel = cancel
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()
        self._ended = False
        self._waiters = Waiters()

    def cancel(self) -> None:
        """Give the order up. Its lanes are free within two ticks; what has come may still be heard. Any thread."""
        self._cancel(self)

    def tell(self, event: Event, *, last: bool = False) -> None:
        """Add an event; none after the last one. Any thread, never raises, never waits.

        A preview that nobody has heard yet makes way for the next one of its picture: whoever listens slowly, or not at
        all, makes the server hold one of each and no more.
        """
        with self._lock:
            if not self._ended:
                if isinstance(event, Preview):
                    self._forget_preview(event.index)
                self._events.append(event)
                self._ended = last
                self._waiters.wake()

    def _forget_preview(self, index: int) -> None:
        old = next((one for one in self._events if isinstance(one, Preview) and one.index == index), None)
        if old is not None:
            self._events = deque(one for one in self._events if one is not old)

    def __aiter__(self) -> Ticket:
        return self

    async def __anext__(self) -> Event:
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._ended:
                    raise StopAsyncIteration
                news = self._waiters.add()
            await news

    async def pictures(self) -> list[Drawn]:
        """All pictures in their order.

        Raises:
            LatentrtError: what the first of them that failed, failed with.
        """
        made: dict[int, Drawn] = {}
        async for event in self:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Picture):
                made[event.index] = event.image
        return [made[index] for index in sorted(made)]
