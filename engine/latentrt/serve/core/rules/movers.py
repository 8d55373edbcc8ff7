"""Who moves in a tick, where more lanes take more time: those who have little are not slowed by those who have much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentrt.serve.core.handle import Slot
from latentrt.serve.core.rules.turns import Turns


class Movers:
    """Chooses pictures for ticks. Nothing takes a lock here."""

    def __init__(self) -> None:
        self._turns = Turns[str]()  # of the clients that have more than others

    def of(self, slots: Sequence[Slot], wanted: Mapping[str, int]) -> list[Slot]:
        """Return the pictures that move in a tick, of those that run.

        They are all pictures of the clients that want the fewest lanes for their share, and of the others, by turns, as
        many lanes again. So a tick takes about twice the time that it would take without the others, however many
        these are. Of a client that waits for its turn the picture is first that has run most rows.

        Args:
            slots: pictures of one shape that run.
            wanted: lanes of all pictures that wait or run, by client.
        """
        highest = max(slot.handle.terms.priority for slot in slots)
        loads = {
            slot.handle.owner: wanted[slot.handle.owner] / slot.handle.terms.share
            for slot in slots
            if slot.handle.terms.priority == highest
        }
        least = min(loads.values())
        chosen = [slot for slot in slots if loads.get(slot.handle.owner) == least]
        return [*chosen, *self._others([slot for slot in slots if slot not in chosen], _lanes(chosen))]

    def _others(self, slots: Sequence[Slot], most: int) -> list[Slot]:
        """Return those of the others whose turn it is: so many lanes at most, but one picture at least."""
        waiting, chosen = sorted(slots, key=lambda one: -one.row), list[Slot]()
        while waiting:
            heads = {slot.handle.owner: slot for slot in reversed(waiting)}
            costs = {owner: slot.handle.lanes / slot.handle.terms.share for owner, slot in heads.items()}
            owner = self._turns.first(costs)
            if chosen and _lanes(chosen) + heads[owner].handle.lanes > most:
                break
            self._turns.take(owner, costs)
            chosen.append(heads[owner])
            waiting.remove(heads[owner])
        return chosen


def _lanes(slots: Sequence[Slot]) -> int:
    return sum(slot.handle.lanes for slot in slots)
