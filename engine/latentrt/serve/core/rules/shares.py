"""The order in which pictures of several clients get lanes: each client has its share of the work.

It is start-time fair queueing (Goyal, Vin and Cheng, 1996): in the time of the shares a picture begins when the one
before it of the same client ends, or when it came, and the one that begins first is first. So a client's sixty pictures
lie between those of others, and a client that was away has no claim to what it did not use.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from latentrt.serve.core.handle import Handle, Slot


class Shares:
    """Who has had how much of the engine. Nothing takes a lock here."""

    def __init__(self) -> None:
        self._now = 0.0  # in rows times lanes times latents, as all that follows
        self._ends: dict[str, float] = {}  # when each client's last picture ends

    def enter(self, handle: Handle) -> None:
        """Let a request's claim begin now."""
        handle.entered = self._now

    def ordered(self, waiting: Sequence[Slot]) -> list[Slot]:
        """Return waiting pictures in the order in which they get lanes.

        Higher priorities come first, then shares decide; of one client's pictures those come first that were paused,
        then the earliest due.

        Args:
            waiting: by due time.
        """
        ends, keyed = dict(self._ends), list[tuple[int, float, Slot]]()
        for slot in sorted(waiting, key=lambda one: one.start is None):
            handle, start = slot.handle, slot.start
            if start is None:
                start = max(handle.entered, ends.get(handle.owner, 0.0))
                ends[handle.owner] = start + _price(slot)
            keyed.append((-handle.terms.priority, start, slot))
        return [slot for *_, slot in sorted(keyed, key=lambda one: (*one[:2], one[2].handle.due))]

    def begin(self, slot: Slot) -> None:
        """Charge a picture that gets lanes, unless it had been paused."""
        if slot.start is None:
            handle = slot.handle
            slot.start = max(handle.entered, self._ends.get(handle.owner, 0.0))
            self._ends[handle.owner] = slot.start + _price(slot)
            self._now = max(self._now, slot.start)

    def end(self, slot: Slot, left: Collection[str]) -> None:
        """Give back what a picture did not use that ends early; forget debts that are paid, and all with the last one.

        Args:
            left: the clients that still have pictures.
        """
        owner = slot.handle.owner
        if slot.start is not None:
            self._ends[owner] -= _price(slot) * (1 - slot.row / slot.handle.rows)
        self._ends = {each: end for each, end in self._ends.items() if each in left or (left and end > self._now)}


def _price(slot: Slot) -> float:
    """Return what a picture takes of its client's share."""
    handle = slot.handle
    return handle.rows * handle.lanes * math.prod(handle.shape) / handle.terms.share
