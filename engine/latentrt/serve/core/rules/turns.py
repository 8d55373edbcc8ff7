"""Whose turn it is: work of different kinds gets the same part of the device, whatever one turn of each costs."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Turns(Generic[K]):
    """Fair turns by cost. A cheap kind has many turns for one of a dear kind, so it waits for one of those at most.

    Nothing takes a lock here.
    """

    def __init__(self) -> None:
        self._spent: dict[K, float] = {}

    def first(self, costs: Mapping[K, float]) -> K:
        """Return the kind whose turn it is: the one that would have spent the least after it.

        Args:
            costs: of a turn of each kind that waits; at least one.
        """
        start = min((self._spent[kind] for kind in costs if kind in self._spent), default=0.0)
        return min(costs, key=lambda kind: max(self._spent.get(kind, start), start) + costs[kind])

    def take(self, kind: K, costs: Mapping[K, float]) -> None:
        """Count a turn of a kind, which was chosen from these.

        What a kind did not use while it had nothing to do is not kept for later.
        """
        start = min((self._spent[each] for each in costs if each in self._spent), default=0.0)
        kept = {each: spent for each, spent in self._spent.items() if spent > start}
        self._spent = {**kept, **{each: max(self._spent.get(each, start), start) for each in costs}}
        self._spent[kind] += costs[kind]
