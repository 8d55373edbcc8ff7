"""The rules of the queue and its forecast: which pictures are next, and when; without threads or clocks."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from copy import deepcopy
from typing import NamedTuple

from latentrt.serve.core.errors import SOON, DeadlineUnreachable, QueueFull, QueueTimeout, RunTimeout
from latentrt.serve.core.handle import Handle, Slot, Stage
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.pipeline import Shape
from latentrt.serve.core.rules.budget import Budget


def next_to_prepare(slots: Iterable[Slot], ahead: int, having: Collection[str]) -> Handle | None:
    """Return the first request that has no jobs yet and could soon need some.

    Args:
        slots: pictures in the order of the queue.
        ahead: those of each shape that may wait prepared. The turn of all others is far off, so that a burst of
            requests does not wait until all of it is prepared.
        having: clients that have pictures with jobs. Those that have none may get lanes at once (`next_to_pause`).
    """
    seen = Counter[Shape]()
    for slot in (slot for slot in slots if slot.stage is Stage.WAITING):
        seen[slot.handle.shape] += 1
        near = seen[slot.handle.shape] <= ahead or slot.handle.owner not in having
        if slot.job is None and slot.handle.submitted and near:
            return slot.handle
    return None


def next_to_run(slots: Sequence[Slot], lanes: int, cap: Callable[[Shape], int]) -> list[Slot]:
    """Return the pictures that may have lanes now, in the order of the queue.

    Those of a shape that is at its cap wait, and other shapes overtake them. But where the network's lanes run out, no
    picture overtakes: otherwise those with one lane would keep one that needs two waiting without end.

    Args:
        slots: pictures in the order of the queue; those without jobs are passed.
        lanes: of the network, in all.
        cap: the most lanes that a shape should have; one picture of a shape may always run.
    """
    taken, closed, chosen = Counter[Shape](), set[Shape](), list[Slot]()
    for slot in (slot for slot in slots if slot.stage is Stage.RUNNING):
        taken[slot.handle.shape] += slot.handle.lanes
    for slot in (slot for slot in slots if slot.stage is Stage.WAITING):
        shape, needed = slot.handle.shape, slot.handle.lanes
        if slot.job is None or shape in closed:
            continue
        if taken[shape] and taken[shape] + needed > cap(shape):
            closed.add(shape)
        elif taken.total() + needed > lanes:
            break
        else:
            taken[shape] += needed
            chosen.append(slot)
    return chosen


def next_to_pause(
    running: Sequence[Slot], chosen: Sequence[Slot], waiting: Sequence[Slot], lanes: int, cap: Callable[[Shape], int]
) -> tuple[Slot, Slot] | None:
    """Return a picture whose client has no lanes, and one to pause for it, of the client that has most; None: none is.

    The one that is paused has run the fewest rows of those; its client keeps others that run, so that clients never
    pause each other in turn.

    Args:
        running, chosen: pictures that have lanes, and those that get some now.
        waiting: the others, in the order of the queue; those without jobs are passed.
        lanes, cap: as of `next_to_run`.
    """
    having = [*running, *chosen]
    held = Counter(slot.handle.owner for slot in having)
    taken = Counter[Shape]()
    for slot in having:
        taken[slot.handle.shape] += slot.handle.lanes
    for slot in (slot for slot in waiting if slot.job is not None and not held[slot.handle.owner]):
        handle, shape = slot.handle, slot.handle.shape
        capped = bool(taken[shape]) and taken[shape] + handle.lanes > cap(shape)
        victims = [
            one
            for one in running
            if held[one.handle.owner] > 1
            and one.handle.terms.priority <= handle.terms.priority
            and (one.handle.shape == shape or not capped)
            and taken.total() - one.handle.lanes + handle.lanes <= lanes
        ]
        if victims:
            return slot, max(victims, key=lambda one: (held[one.handle.owner], -one.row))
    return None


class Limits(NamedTuple):
    """What pictures may take.

    Attributes:
        queue: pictures that may wait.
        queue_timeout: seconds that one may wait for lanes.
        run_timeout: seconds that one may take once it has them.
        hang: seconds after which a step, a stage or a self-check that has not returned counts as hung.
    """

    queue: int = 64
    queue_timeout: float = 120
    run_timeout: float = 300
    hang: float = 60


class Forecast:
    """Predicts when pictures are done and places are free, by what was measured; it learns from every tick (`curve`).

    Seats are counted in pictures of as many lanes as any of them takes, and rows of other shapes in rows of this one by
    their pixels: a forecast is right to tens of percent.

    Args:
        places: pictures that may wait.
        budget: says how many lanes of a shape run at once.
        measured: says how many of them pay, and at first how long a tick takes.
    """

    def __init__(self, places: int, budget: Budget, measured: Curve) -> None:
        self._places, self._budget = places, budget
        self._caps, self.curve = measured, deepcopy(measured)

    def cap(self, shape: Shape) -> int:
        """Return the most lanes of this shape that a tick should have."""
        return min(self._budget.cap(shape), self._caps.cap(shape, self._budget.lanes))

    def full(self, pictures: int, slots: Sequence[Slot], *, first: bool = False) -> QueueFull | None:
        """Return why so many pictures have no place beside these, and when they may have one; None where they have.

        Args:
            first: their client has none that wait. Such clients find a quarter as many places more, so that others
                cannot fill the queue before them.
        """
        waiting = sum(slot.stage is Stage.WAITING for slot in slots)
        free = self._places - waiting + (-(-self._places // 4) if first else 0)
        if pictures > self._places:
            needed = f"at most {self._places} at once"
            return QueueFull(f"{pictures} pictures", needed, fix="ask for fewer pictures")
        if pictures <= free:
            return None
        tick, starts = self._begins(slots, self._budget.own, max(slot.handle.lanes for slot in slots))
        seconds = 0.0 if tick is None else starts[min(pictures - free, waiting) - 1] * tick
        found = f"{max(0, free)} of {self._places} places in the queue are free"
        return QueueFull(found, needed=f"{pictures}", fix="try again later", retry_after=max(SOON, seconds))

    def refuse(self, handle: Handle, ahead: Sequence[Slot]) -> None:
        """Refuse a request that behind these pictures would not be done by its deadline.

        Raises:
            DeadlineUnreachable: it would not.
        """
        if handle.deadline == math.inf:
            return
        left = handle.deadline - handle.came
        needed, alone = self._seconds(handle, ahead), self._seconds(handle, [])
        if needed > left:
            helps = alone <= left
            raise DeadlineUnreachable(
                f"the pictures would be done in {needed:.1f} s",
                needed=f"in {max(0.0, left):.1f} s",
                fix="try again later" if helps else "allow more time, or take fewer steps",
                retry_after=max(SOON, needed - left) if helps else None,
            )

    def _seconds(self, handle: Handle, ahead: Sequence[Slot]) -> float:
        """Return the seconds until a request behind these is done; 0 where nothing was measured."""
        pictures, rows = handle.request.count, float(handle.rows)
        each = max([handle.lanes, *(slot.handle.lanes for slot in ahead)])
        tick, starts = self._begins(ahead, handle.shape, each, *[rows] * pictures)
        return 0.0 if tick is None else (starts[-1] + rows) * tick + pictures * self.curve.decoding(handle.shape)

    def _begins(self, slots: Sequence[Slot], shape: Shape, each: int, *more: float) -> tuple[float | None, list[float]]:
        """Return the seconds of a tick, and after how many ticks each waiting picture begins, then those of more rows.

        Each picture counts as so many lanes.
        """
        cap = self.cap(shape)
        used = min(cap, sum(slot.handle.lanes for slot in slots) + each)
        running = [_rows(slot, shape) for slot in slots if slot.stage > Stage.WAITING]
        waiting = [_rows(slot, shape) for slot in slots if slot.stage is Stage.WAITING]
        return self.curve.seconds(shape, used), begins(running, [*waiting, *more], max(1, cap // each))


def _rows(slot: Slot, shape: Shape) -> float:
    """Return the rows that a picture still has to run, as rows of this shape."""
    return (slot.handle.rows - slot.row) * math.prod(slot.handle.shape) / math.prod(shape)


def too_late(slot: Slot, now: float) -> QueueTimeout | RunTimeout:
    """Return the error of a picture whose time is over."""
    seconds = f"{now - slot.handle.came:.1f} s after the request came"
    if slot.stage is Stage.WAITING:
        state = "was paused and has not gone on" if slot.row else "has not begun"
        return QueueTimeout(f"the picture {state} {seconds}", needed="a shorter queue", fix="ask again later")
    return RunTimeout(f"the picture is not done {seconds}", needed="a smaller or shorter one", fix="take fewer steps")


def begins(running: Sequence[float], waiting: Sequence[float], seats: int) -> list[float]:
    """Return when each waiting picture begins, in ticks from now, where `seats` run at once.

    Args:
        running, waiting: the rows that each still has; the waiting in their order.
    """
    ends = sorted([*running, *[0.0] * (seats - len(running))])
    while len(ends) > seats:  # more run than there are seats: the first ones to end free none
        ends.pop(0)
    starts = []
    for rows in waiting:
        starts.append(ends[0])
        heapq.heapreplace(ends, ends[0] + rows)
    return starts
