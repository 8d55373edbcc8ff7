"""Objects that take device memory: kept for the next use, and closed where something else needs the memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

from latentrt.errors import DeviceMemoryError


class Closable(Protocol):
    def close(self) -> None: ...


K = TypeVar("K", bound=Hashable)
V = TypeVar("V", bound=Closable)


class Pool(Generic[K, V]):
    """Values by key, made at their first use. The least recently used make room for new ones.

    Args:
        most: how many are kept; more only where all are in use.
        in_use: returns whether a value may not be closed.
    """

    def __init__(self, most: int, in_use: Callable[[V], bool] = lambda value: False) -> None:
        self._most, self._in_use = most, in_use
        self._values: OrderedDict[K, V] = OrderedDict()

    def __call__(self, key: K, make: Callable[[], V]) -> V:
        """Return the value of a key. Where there is no memory for a new one, all that are not in use are closed.

        Raises:
            DeviceMemoryError: there is not enough memory even then.
        """
        if key not in self._values:
            spare = self._spare()
            for old in spare[: max(0, len(self._values) - self._most + 1)]:
                self._close(old)
            try:
                self._values[key] = make()
            except DeviceMemoryError:
                spare = self._spare()
                if not spare:
                    raise
                for old in spare:
                    self._close(old)
                self._values[key] = make()
        self._values.move_to_end(key)
        return self._values[key]

    def __getitem__(self, key: K) -> V:
        return self._values[key]

    def __len__(self) -> int:
        return len(self._values)

    def close(self) -> None:
        """Close all values."""
        for key in list(self._values):
            self._close(key)

    def _spare(self) -> list[K]:
        return [key for key, value in self._values.items() if not self._in_use(value)]

    def _close(self, key: K) -> None:
        self._values.pop(key).close()
