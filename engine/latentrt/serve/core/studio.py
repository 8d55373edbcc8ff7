"""Before and after the ticks: orders become jobs, latents become pictures and previews.

On a CPU a thread of its own does it, and the ticks go on meanwhile. On a GPU there is one stream and one thread: the
engine's thread does one piece between two ticks.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
from numpy.typing import NDArray

from latentrt.engine import Engine
from latentrt.errors import LatentrtError, RequestError
from latentrt.run.job import Job
from latentrt.serve.core import stages
from latentrt.serve.core.desk import Desk, as_error
from latentrt.serve.core.queue import Part
from latentrt.serve.core.ticket import Failed, Picture, Preview, Ticket

Piece = Callable[[], None]
ORDERS, PICTURES = 8, 4  # at most in one piece, on a CPU
BATCHES = 2  # that wait prepared, at most: the next one, and the one after it
LATENTS = 64 * 64  # and pictures of no more latents in all: decoding takes gigabytes for each 512 x 512 pixels


class Studio:
    """Takes pieces of work from the desk, one at a time: orders and pictures by turns, previews where neither waits.

    Args:
        orders, pictures: the most in one piece. On a GPU 1: a network's results are the same bits for a fixed batch
            only.
    """

    def __init__(self, desk: Desk, engine: Engine, *, orders: int = ORDERS, pictures: int = PICTURES) -> None:
        self._desk, self._engine = desk, engine
        self._orders_at_once, self._pictures_at_once = orders, pictures
        self._ahead = BATCHES * engine.denoiser.lanes
        self._turns: deque[Callable[[], Piece | None]] = deque([self._next_orders, self._next_pictures])

    def run(self) -> None:
        """Work until the desk is closed."""
        while True:
            with self._desk.changed:
                while not self._desk.closed and (piece := self._next()) is None:
                    self._desk.changed.wait()
                if self._desk.closed:
                    return
            assert piece is not None
            self._do(piece)

    def work(self) -> bool:
        """Do one piece; False where there was none."""
        with self._desk.changed:
            piece = self._next()
        if piece is not None:
            self._do(piece)
        return piece is not None

    @property
    def waits(self) -> bool:
        """Whether there is a piece to do."""
        desk = self._desk
        return bool(desk.queue.unprepared(1, self._ahead) or desk.denoised or desk.sketches)

    def _next(self) -> Piece | None:
        for _ in range(len(self._turns)):
            self._turns.rotate(-1)
            piece = self._turns[-1]()
            if piece is not None:
                return piece
        return self._next_sketch()

    def _do(self, piece: Piece) -> None:
        with self._desk.doing("stage"):
            piece()

    # ---- Orders to jobs

    def _next_orders(self) -> Piece | None:
        tickets = self._desk.queue.unprepared(self._orders_at_once, self._ahead)
        return partial(self._prepare, tickets) if tickets else None

    def _prepare(self, tickets: list[Ticket]) -> None:
        with self._timed("prepare", len(tickets)):
            prepared = stages.prepare(self._engine, [ticket.order for ticket in tickets])
        for ticket, made in zip(tickets, prepared, strict=True):
            try:
                self._seat(ticket, made)
            except Exception as error:
                self._refuse(ticket, error)

    def _seat(self, ticket: Ticket, made: list[Job] | Exception) -> None:
        if isinstance(made, Exception):
            raise made
        lanes = self._engine.denoiser.lanes
        if made[0].most_lanes > lanes:
            raise RequestError(
                f"the picture takes {made[0].most_lanes} lanes",
                needed=f"at most {lanes}",
                fix="set guidance_scale to 1",
            )
        for cut in stages.cuts(self._engine, ticket.order.request):
            ticket.tell(cut)
        with self._desk.changed:
            for part, job in zip(self._desk.orders.get(ticket, ()), made, strict=False):
                part.job, part.lanes, part.rows = job, job.most_lanes, len(job.table)
                channels, height, width = job.latents.shape
                part.shape = channels, height, width
                part.previews = preview_rows(part.rows, ticket.order.previews)
            self._desk.changed.notify_all()

    def _refuse(self, ticket: Ticket, error: Exception) -> None:
        if stages.is_fault(error):
            self._desk.suspect(as_error(error))
        self._desk.fail(ticket, as_error(error))

    # ---- Latents to pictures

    def _next_pictures(self) -> Piece | None:
        """The oldest pictures of one shape; those that are over by now are left out."""
        waiting = self._desk.denoised
        while waiting and waiting[0].ended:
            waiting.popleft()
        if not waiting:
            return None
        shape = waiting[0].shape
        most = max(1, min(self._pictures_at_once, LATENTS // (shape[1] * shape[2])))
        parts = [part for part in waiting if part.shape == shape and not part.ended][:most]
        for part in parts:
            waiting.remove(part)
        self._desk.changed.notify_all()  # lanes may have waited for this to become less
        return partial(self._draw, parts)

    def _draw(self, parts: list[Part]) -> None:
        """Where a batch raises, each is drawn alone: the one at fault fails, the others do not."""
        try:
            with self._timed("decode", len(parts)):
                drawn = stages.draw(self._engine, [part.job for part in parts if part.job is not None])
        except Exception as error:
            if len(parts) > 1:
                for part in parts:
                    self._draw([part])
            else:
                self._desk.suspect(as_error(error))
                self._desk.end(parts[0], Failed(parts[0].index, as_error(error)))
            return
        for part, picture in zip(parts, drawn, strict=True):
            if isinstance(picture, LatentrtError):
                self._desk.end(part, Failed(part.index, picture))
            else:
                self._desk.end(part, Picture(part.index, picture))

    # ---- Previews

    def _next_sketch(self) -> Piece | None:
        for part in self._desk.sketches:
            return partial(self._sketch, part, *self._desk.sketches.pop(part))
        return None

    def _sketch(self, part: Part, number: int, latents: NDArray[np.float32]) -> None:
        """A preview that cannot be drawn is left out: the picture may still come out."""
        try:
            with self._timed("preview", 1):
                image = stages.sketch(self._engine, latents)
        except LatentrtError:
            return
        self._desk.tell(part, Preview(part.index, number, image))

    @contextmanager
    def _timed(self, stage: str, count: int) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._desk.observer.staged(stage, time.monotonic() - start, count)


def preview_rows(rows: int, previews: int) -> dict[int, int]:
    """After how many rows which preview is wanted: evenly spread, none after the last row, one a row at most."""
    wanted: dict[int, int] = {}
    for number in range(previews):
        row = round((number + 1) * rows / (previews + 1))
        if 0 < row < rows:
            wanted.setdefault(row, number)
    return wanted
