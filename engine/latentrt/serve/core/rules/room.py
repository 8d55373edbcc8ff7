"""Which models are dropped so that another one has room; without threads or clocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Resident(NamedTuple):
    """A model that is loaded.

    Attributes:
        name: of the model.
        bytes: that it takes.
        used: when it was used last; the smaller, the longer ago.
        busy: whether it is in use, so that it stays.
    """

    name: str
    bytes: int
    used: float
    busy: bool


def to_drop(residents: Sequence[Resident], needed: int, room: int | None) -> list[str] | None:
    """Return the models to drop, least recently used first, so that one of `needed` bytes fits; None: it does not yet,
    since others are busy.

    One that is larger than the whole room has it alone.

    Args:
        residents: all that are loaded.
        room: bytes that all may take together; None: any number.
    """
    if room is None:
        return []
    left, found = room - sum(one.bytes for one in residents), list[str]()
    for one in sorted(residents, key=lambda one: one.used):
        if left >= needed:
            break
        if not one.busy:
            left += one.bytes
            found.append(one.name)
    return found if left >= min(needed, room) else None
