"""The pictures of a server that are not over: who is refused a place, and who is next. The scheduler guards it."""

from __future__ import annotations

import math
from bisect import insort
from collections import Counter
from collections.abc import Mapping, Sequence

from latentrt.serve.core.errors import SOON, QueueFull, QuotaExceeded
from latentrt.serve.core.handle import Handle, Slot, Stage, Work
from latentrt.serve.core.pipeline import Shape
from latentrt.serve.core.queue import Forecast, Limits, next_to_pause, next_to_prepare, next_to_run
from latentrt.serve.core.rules.shares import Shares
from latentrt.serve.core.rules.turns import Turns

PATIENCE = 0.5  # the part of queue_timeout after which a request without a deadline is due
BATCHES = 2  # that wait prepared, at most: the next one, and the one after it


class Line:
    """Nothing takes a lock here.

    Args:
        lanes: of the network.
        limits: of waiting and running.
        forecast: says what is refused, and how many lanes a shape may have.
        pauses: whether pictures that run can be paused.

    Attributes:
        slots: by due time, and in order of arrival where it is equal.
    """

    def __init__(self, lanes: int, limits: Limits, forecast: Forecast, *, pauses: bool) -> None:
        self.slots: list[Slot] = []
        self._lanes, self._limits, self._forecast, self._pauses = lanes, limits, forecast, pauses
        self._shares, self._decodes = Shares(), Turns[tuple[str, Shape]]()

    def at(self, stage: Stage) -> list[Slot]:
        """Return the pictures of a stage, by due time."""
        return [slot for slot in self.slots if slot.stage is stage]

    @property
    def waiting(self) -> list[Slot]:
        """Those without lanes, in the order in which they get them."""
        return self._shares.ordered(self.at(Stage.WAITING))

    @property
    def wanted(self) -> Counter[str]:
        """The lanes of those that wait or run, by client."""
        lanes = Counter[str]()
        for slot in (slot for slot in self.slots if slot.stage <= Stage.RUNNING):
            lanes[slot.handle.owner] += slot.handle.lanes
        return lanes

    # ---- In and out

    def full(self, pictures: int, owner: str) -> QueueFull | None:
        """Return why so many pictures of a client have no place; None where they have one."""
        first = all(slot.handle.owner != owner for slot in self.at(Stage.WAITING))
        return self._forecast.full(pictures, self.slots, first=first)

    def enter(self, handle: Handle, now: float) -> None:
        """Give a request its places.

        Raises:
            QueueFull, QuotaExceeded, DeadlineUnreachable: it is refused.
        """
        count, terms = handle.request.count, handle.terms
        held = sum(slot.handle.owner == handle.owner for slot in self.slots)
        if terms.places is not None and held + count > terms.places:
            found, hopeless = f"{count} pictures beside {held} of the same key", count > terms.places
            fix = "ask for fewer pictures" if hopeless else "wait for those"
            raise QuotaExceeded(
                found, needed=f"at most {terms.places} at once", fix=fix, retry_after=None if hopeless else SOON
            )
        full = self.full(count, handle.owner)
        if full is not None:
            raise full
        wait = self._limits.queue_timeout
        handle.came, handle.due = now, min(now + PATIENCE * wait, handle.deadline)
        self._shares.enter(handle)
        limit = min(now + wait, handle.deadline)
        slots = [Slot(handle, index, limit) for index in range(count)]
        order = self._shares.ordered(sorted([*self.at(Stage.WAITING), *slots], key=lambda one: one.handle.due))
        before = order[: max(map(order.index, slots))]
        begun = [slot for slot in self.slots if slot.stage > Stage.WAITING]
        self._forecast.refuse(handle, [*begun, *(slot for slot in before if slot.handle is not handle)])
        handle.slots = slots
        for slot in slots:
            insort(self.slots, slot, key=lambda one: one.handle.due)

    def leave(self, slot: Slot) -> None:
        """Forget a picture, which is not over yet."""
        self.slots.remove(slot)
        self._shares.end(slot, {one.handle.owner for one in self.slots})

    # ---- What is next

    def next_running(self) -> tuple[list[Slot], Slot | None]:
        """Return the pictures that may have lanes now, and the one that is paused for the last of them, if any is."""
        running, waiting = self.at(Stage.RUNNING), self.waiting
        chosen = next_to_run([*running, *waiting], self._lanes, self._forecast.cap)
        if not self._pauses:
            return chosen, None
        others = [slot for slot in waiting if slot not in chosen]
        begins, paused = next_to_pause(running, chosen, others, self._lanes, self._forecast.cap) or (None, None)
        return chosen if begins is None else [*chosen, begins], paused

    def begin(self, joining: Sequence[Slot], paused: Slot | None, now: float) -> None:
        """Record that pictures get lanes, and which one was paused for them. What else they may take begins now.

        Pictures that wait for others of their own request may wait longer: the queue was not too long.
        """
        if paused is not None:
            paused.stage = Stage.WAITING
        for slot in joining:
            slot.stage = Stage.RUNNING
            slot.began = slot.began or now
            self._shares.begin(slot)
        run, wait = self._limits.run_timeout, self._limits.queue_timeout
        begun = [slot for slot in (*joining, paused) if slot is not None]
        for slot in dict.fromkeys(one for each in begun for one in each.handle.slots):
            if slot.stage is Stage.WAITING:
                slot.limit = min(now + run + wait, slot.handle.deadline)
        for slot in joining:
            slot.limit = min(now + run, slot.handle.deadline)

    def next_side_work(self, *, decodes_first: bool, below: float = math.inf) -> Work | None:
        """Return a request to prepare or a picture to decode; where neither waits, a picture with a preview.

        Args:
            decodes_first: where both wait.
            below: take only pictures with fewer latents (height times width).
        """
        smaller = [slot for slot in self.slots if math.prod(slot.shape[1:]) < below]
        waiting = self._shares.ordered([slot for slot in smaller if slot.stage is Stage.WAITING])
        having = {slot.handle.owner for slot in self.slots if slot.job is not None}
        request = next_to_prepare(waiting, BATCHES * self._lanes, having)
        denoised = [slot for slot in smaller if slot.stage is Stage.DENOISED]
        picture = None
        if denoised:
            kind = self._decodes.first(_costs(denoised))
            picture = next(slot for slot in denoised if _kind(slot) == kind)
        if request is not None and (picture is None or not decodes_first):
            return Work(request)
        if picture is not None:
            return Work(picture.handle, picture)
        previews = (Work(slot.handle, slot, slot.preview) for slot in smaller if slot.preview is not None)
        return next(previews, None)

    def begin_side_work(self, work: Work) -> None:
        """Record that a piece of work is done now."""
        slot = work.slot
        if slot is not None and work.preview is None:
            self._decodes.take(_kind(slot), _costs(self.at(Stage.DENOISED)))
            slot.stage = Stage.DECODING
        elif slot is not None:
            slot.preview = None


def _kind(slot: Slot) -> tuple[str, Shape]:
    return slot.handle.owner, slot.shape


def _costs(denoised: Sequence[Slot]) -> Mapping[tuple[str, Shape], float]:
    """Return what decoding costs each client, by its shapes; clients with the fewest pictures come first."""
    count = Counter(map(_kind, denoised))
    return {_kind(slot): math.prod(slot.shape) for slot in sorted(denoised, key=lambda one: count[_kind(one)])}
