"""The last results of something, by key."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

Result = TypeVar("Result")


class Kept(Generic[Result]):
    """Keeps the last few results. Any thread may ask; two that ask for one that is not there both make it.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most, self._known, self._lock = most, OrderedDict[Hashable, Result](), Lock()

    def __call__(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """Return the result of a key, made now if it is not there."""
        with self._lock:
            found = self._known.get(key)
        made = make() if found is None else found
        with self._lock:
            self._known[key] = made
            self._known.move_to_end(key)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        return made
