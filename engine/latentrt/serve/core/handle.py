"""Handle: one request in the server, from its place in the queue to its last picture."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

from PIL.Image import Image

from latentrt.errors import LatentrtError
from latentrt.images.picture import Picture
from latentrt.request import Request
from latentrt.run.job import Float32, Job
from latentrt.serve.core.errors import Cancelled
from latentrt.serve.core.pipeline import GUIDED, Shape
from latentrt.serve.core.rules.terms import Terms

SHOWN = 200  # characters of a text in a warning


@dataclass(frozen=True, slots=True)
class Preview:
    """What a picture would be if it ended now; `number` counts from 0 and skips previews that were dropped."""

    index: int
    number: int
    image: Image


@dataclass(frozen=True, slots=True)
class Finished:
    """A picture is done."""

    index: int
    image: Picture


Event = Preview | Finished


class Stage(IntEnum):
    """How far a picture is: in the queue, in the network's lanes, before the VAE, in it, and done or failed."""

    WAITING, RUNNING, DENOISED, DECODING, OVER = range(5)


class Mark(NamedTuple):
    """A part of a request's work: "prepare", "steps", "decode" or "preview"; of which picture (None: of all), and its
    begin and end in `time.monotonic()`.
    """

    name: str
    picture: int | None
    start: float
    end: float


@dataclass(slots=True, eq=False)
class Slot:
    """One picture of a request: its place in the queue, then its lanes.

    Attributes:
        limit: the `time.monotonic()` at which it fails if it has not come further.
        job: from when it is prepared until it is over.
        preview: the number and the latents of the newest preview that waits for the VAE.
        stops: whether its next row is its last, whose prediction is the picture.
        start: when it first got lanes, in the time of `Shares`.
        began: the same in that of `time.monotonic()`.
    """

    handle: Handle
    index: int
    limit: float
    stage: Stage = Stage.WAITING
    job: Job | None = None
    preview: tuple[int, Float32] | None = None
    stops: bool = False
    start: float | None = None
    began: float | None = None

    def stepped(self) -> None:
        """Mark that its steps end now, whether or not all have run."""
        if self.began is not None:
            self.handle.marks.append(Mark("steps", self.index, self.began, time.monotonic()))

    @property
    def shape(self) -> Shape:
        """Of its latents as they are now: hires fix enlarges them."""
        job = self.job
        if job is None:
            return self.handle.shape
        channels, height, width = job.latents.shape
        return channels, height, width

    @property
    def row(self) -> int:
        """Rows that have run."""
        job = self.job
        return self.handle.rows if self.stage is Stage.OVER else 0 if job is None else job.moved


class Work(NamedTuple):
    """A piece of work beside the ticks: a request to prepare, or of a picture the decoding, or that of a preview.

    Attributes:
        slot: the picture; None: the request is prepared.
        preview: its number and its latents; None: the picture itself is decoded.
    """

    handle: Handle
    slot: Slot | None = None
    preview: tuple[int, Float32] | None = None

    @property
    def area(self) -> int:
        """Latents, height times width, of one picture."""
        return math.prod((self.handle if self.slot is None else self.slot).shape[1:])

    @property
    def over(self) -> bool:
        """Whether no client waits for it any more."""
        return self.handle.over if self.slot is None else self.slot.stage is Stage.OVER


@dataclass(slots=True, eq=False)
class Handle:
    """Stands for one request in the server: the scheduler changes it, its client reads it and iterates over its events.

    Attributes:
        request: what is asked for, the defaults filled in; `count` is the number of pictures.
        shape: of each picture's latents, in the stage that has the most.
        rows: network calls of each picture; a good guess until its job is there.
        previews: to deliver of each picture, spread over its rows; fewer come where decoding, or the client, lags.
        deadline: the `time.monotonic()` by which all pictures must be done; infinity if there is none.
        id, owner, api, task: the request's id, its key's name or without keys its client's address, the API it came by,
            the client's own name for it.
        terms: what its client has been promised.
        lanes: of the network that each picture takes.
        slots: one for each picture, from the reservation on.
        submitted: whether everything has come that its pictures need.
        came, started: when it was reserved, and when its first row was done.
        due: its rank among its client's requests; the smaller, the sooner.
        entered: when it was reserved, in the time of `Shares`.
        done: pictures that are finished.
        cut: the end of each text that the model does not read, by the text's field.
        letters: what each text has that is drawn as letters, and who reads it, by the text's field.
        shown: the newest preview or picture.
        marks: the parts of its work that are over.
    """

    request: Request
    shape: Shape
    rows: int
    previews: int = 0
    deadline: float = math.inf
    id: str = ""
    owner: str = ""
    api: str = ""
    task: str | None = None
    terms: Terms = field(default_factory=Terms)
    lanes: int = field(init=False)
    slots: list[Slot] = field(init=False, default_factory=list)
    submitted: bool = field(init=False, default=False)
    came: float = field(init=False, default_factory=time.monotonic)
    started: float | None = field(init=False, default=None)
    due: float = field(init=False, default=0.0)
    entered: float = field(init=False, default=0.0)
    done: int = field(init=False, default=0)
    cut: Mapping[str, str] = field(init=False, default_factory=dict)
    letters: Mapping[str, str] = field(init=False, default_factory=dict)
    shown: Image | None = field(init=False, default=None)
    marks: list[Mark] = field(init=False, default_factory=list)
    _lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _events: deque[Event] = field(init=False, default_factory=deque)
    _news: Future[None] = field(init=False)
    _end: Exception | None = field(init=False, default=None)  # what is raised after the last event

    def __post_init__(self) -> None:
        self.lanes = GUIDED if (self.request.guidance or 0) > 1 else 1
        self._news = _signal()

    # ---- What the scheduler does

    def tell(self, event: Event) -> None:
        """Add an event. A preview that the client has not read yet is replaced by the next one of its picture."""
        with self._lock:
            if isinstance(event, Preview):
                kept = (one for one in self._events if not (isinstance(one, Preview) and one.index == event.index))
                self._events = deque(kept)
            self._events.append(event)
            if self.over:
                self._end = StopAsyncIteration()
            self.shown = event.image
            self._wake()

    def fail(self, error: LatentrtError) -> None:
        """End the events with an error."""
        self._close(error)

    def stop(self, *, waiting: bool) -> list[Slot]:
        """Let pictures that run end with their next row's prediction. Return those that are to end without: those that
        wait, if they are to end too. Where nothing is left that comes, this ends the events.
        """
        open_ones = [slot for slot in self.slots if slot.stage < Stage.OVER]
        for slot in open_ones:
            slot.stops |= slot.stage is Stage.RUNNING
        dropped = [slot for slot in open_ones if slot.stage is Stage.WAITING] if waiting else []
        if dropped == open_ones != []:
            self._close(StopAsyncIteration() if self.done else Cancelled.of("interrupted before it began"))
        return dropped

    def _close(self, end: Exception) -> None:
        with self._lock:
            self._end = end
            self._wake()

    def _wake(self) -> None:
        news, self._news = self._news, _signal()
        news.set_result(None)

    # ---- What its client does

    def __aiter__(self) -> Handle:
        return self

    async def __anext__(self) -> Event:
        """Return the next event as soon as there is one; each is returned once, and the last picture is the last event.

        Raises:
            LatentrtError: the request failed.
        """
        while True:
            with self._lock:
                if self._events:
                    return self._events.popleft()
                if self._end is not None:
                    raise self._end
                news = self._news
            await asyncio.wrap_future(news)

    async def pictures(self) -> list[Picture]:
        """Wait for all pictures; return them in their order.

        Raises:
            LatentrtError: the request failed.
        """
        made = {event.index: event.image async for event in self if isinstance(event, Finished)}
        return [made[index] for index in sorted(made)]

    # ---- Its progress

    @property
    def over(self) -> bool:
        """Whether all its pictures are done, or it failed."""
        return all(slot.stage is Stage.OVER for slot in self.slots)

    @property
    def row(self) -> int:
        """Rows that have run of the picture that is furthest."""
        return max((slot.row for slot in self.slots), default=0)

    @property
    def progress(self) -> float:
        """The part of its network calls that were made, 0 to 1."""
        return sum(slot.row for slot in self.slots) / (self.rows * self.request.count)

    @property
    def queue_seconds(self) -> float:
        """How long it waited for its first row, or waits."""
        return (self.started or time.monotonic()) - self.came

    def queued(self, now: float) -> Mark:
        """Return how long it waited until its first picture got lanes; until now where none has."""
        began = [slot.began for slot in self.slots if slot.began is not None]
        return Mark("queue", None, self.came, min(began, default=now))

    def preview_at(self, row: int) -> int | None:
        """Return the number of the preview that is wanted after so many rows: evenly spread, none after the last."""
        for number in range(self.previews):
            if row == round((number + 1) * self.rows / (self.previews + 1)) and 0 < row < self.rows:
                return number
        return None

    @property
    def warnings(self) -> list[str]:
        """What the client should know of its pictures."""
        texts = {name: text if len(text) <= SHOWN else f"{text[:SHOWN]}..." for name, text in self.cut.items()}
        cut = [f"{name} is longer than the model reads; it did not read: {text}" for name, text in texts.items()]
        return [*cut, *self.letters.values()]


def _signal() -> Future[None]:
    """Return a future that tasks of any event loop can wait for; none of them can cancel it for the others."""
    future = Future[None]()
    future.set_running_or_notify_cancel()
    return future
