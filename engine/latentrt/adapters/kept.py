"""What was made lately, by key, within a bound."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


def _one(value: object) -> int:
    return 1


class Kept(Generic[K, V]):
    """Keeps values until they are too many, or too large together; those used longest ago go first, the newest stays.

    Any thread may ask.

    Args:
        most: values, or bytes.
        size: of a value, in bytes; without it values are counted.
    """

    def __init__(self, most: int, size: Callable[[V], int] = _one) -> None:
        self._most, self._size = most, size
        self._known: dict[K, V] = {}  # the least recently used first
        self._lock = Lock()

    def __call__(self, key: K, make: Callable[[], V]) -> V:
        """Return what is known, or else make it. Threads that make the same at once get the same."""
        with self._lock:
            known = self._known.get(key)
        value = make() if known is None else known
        with self._lock:
            value = self._known.pop(key, value)
            self._known[key] = value
            sizes = {each: self._size(one) for each, one in self._known.items()}
            total = sum(sizes.values())
            for old in list(self._known)[:-1]:
                if total <= self._most:
                    break
                total -= sizes[old]
                del self._known[old]
        return value

    def clear(self) -> None:
        """Forget all."""
        with self._lock:
            self._known.clear()
