"""Who is next: the queue and its rules, without threads or clocks."""

from __future__ import annotations

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from latentrt.run.job import Job
from latentrt.serve.core.curve import Shape
from latentrt.serve.core.ticket import Ticket


@dataclass(slots=True, eq=False)
class Part:
    """One picture of an order on its way through the service.

    Attributes:
        shape, lanes, rows: of its job; by the order's own words until there is a job.
        accepted: when the order came; all times are `time.monotonic()`.
        due: its rank in the queue; the smaller, the sooner.
        limit: when it fails if it has not come further.
        job: once prompts are encoded and noise is drawn.
        admitted: when it was given lanes.
        previews: the number of the preview that is wanted after so many rows.
        ended: whether its last event was told.
    """

    ticket: Ticket
    index: int
    shape: Shape
    lanes: int
    rows: int
    accepted: float
    due: float
    limit: float
    job: Job | None = None
    admitted: float | None = None
    previews: dict[int, int] = field(default_factory=dict)
    ended: bool = False

    @property
    def rows_left(self) -> int:
        """Rows that have not run yet."""
        return self.rows - (self.job.row if self.job is not None else 0)


class Queue:
    """Pictures that wait, sooner ones first, and places that are promised to pictures to come.

    Nobody waits for ever: whoever grants `due` times bounds them by the time of arrival, so that newcomers rank behind
    in the end; and who is first is never passed by one that takes the lanes it waits for.

    Args:
        places: the most pictures that may wait.
    """

    def __init__(self, places: int) -> None:
        self.places = places
        self.reserved = 0
        self.waiting: list[Part] = []

    @property
    def free(self) -> int:
        """Places that are neither taken nor promised."""
        return self.places - self.reserved - len(self.waiting)

    def add(self, parts: Sequence[Part]) -> None:
        """Let pictures wait: by their due time, in order of arrival where it is the same."""
        for part in parts:
            insort(self.waiting, part, key=lambda one: one.due)

    def discard(self, part: Part) -> None:
        """Let a picture wait no more; one that does not is left alone."""
        if part in self.waiting:
            self.waiting.remove(part)

    def unprepared(self, most: int, ahead: int) -> list[Ticket]:
        """The first orders, at most so many, that have no jobs yet and could soon need some.

        Args:
            ahead: pictures of each shape that may wait prepared. The others' turn is far: whoever comes in a crowd does
                not wait until all of it is prepared.
        """
        tickets, seen = dict[Ticket, None](), Counter[Shape]()
        for part in self.waiting:
            seen[part.shape] += 1
            if part.job is None and seen[part.shape] <= ahead:
                tickets[part.ticket] = None
        return list(tickets)[:most]

    def next(self, lanes: int, busy: Mapping[Shape, int], cap: Callable[[Shape], int]) -> list[Part]:
        """The pictures that may have lanes now, in their order.

        Those of a shape that is at its cap wait, and other shapes pass them. But where the lanes of the network
        themselves run out, nobody passes: otherwise pictures with one lane would keep one that needs two for ever.

        Args:
            lanes: of the network, in all.
            busy: lanes that are taken, by shape.
            cap: the most lanes that a shape should have; one picture of a shape may always run.
        """
        taken, closed, chosen = dict(busy), set[Shape](), list[Part]()
        for part in self.waiting:
            if part.job is None or part.shape in closed:
                continue
            own = taken.get(part.shape, 0)
            if own and own + part.lanes > cap(part.shape):
                closed.add(part.shape)
            elif sum(taken.values()) + part.lanes > lanes:
                break
            else:
                taken[part.shape] = own + part.lanes
                chosen.append(part)
        return chosen


def sooner(moment: float, deadline: float | None) -> float:
    """The earlier of the two."""
    return moment if deadline is None else min(moment, deadline)


def begins(running: Sequence[float], waiting: Sequence[float], seats: int) -> list[float]:
    """When each waiting picture begins, in ticks from now, where `seats` run at once.

    Args:
        running, waiting: the rows that each still has; the waiting in their order.
    """
    ends = sorted([*running, *[0.0] * (seats - len(running))])
    while len(ends) > seats:  # more run than should: the first to end are not followed
        ends.pop(0)
    starts = []
    for rows in waiting:
        starts.append(ends[0])
        heapq.heapreplace(ends, ends[0] + rows)
    return starts
