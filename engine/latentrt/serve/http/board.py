"""What is going on: the requests whose pictures wait or run, for whoever asks after them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from latentrt.serve.core.ticket import Cut, Event, Picture, Preview, Progress, Started, Ticket

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(slots=True, eq=False)
class Entry:
    """One request: its ticket and how far it is."""

    id: str
    ticket: Ticket
    pictures: int
    rows: int
    api: str
    task: str | None = None
    owner: str = ""
    made: float = field(default_factory=time.monotonic)
    started: float | None = None
    done: int = 0
    at: dict[int, int] = field(default_factory=dict)
    preview: Image | None = None
    cuts: list[Cut] = field(default_factory=list)

    def note(self, event: Event) -> None:
        """Take an event of the ticket into account."""
        match event:
            case Cut():
                self.cuts.append(event)
            case Started():
                self.started = time.monotonic() if self.started is None else self.started
            case Progress(index=index, row=row):
                self.at[index] = row
            case Preview(image=image):
                self.preview = image
            case Picture(index=index, image=image):
                self.at[index] = self.rows
                self.done += 1
                self.preview = image

    @property
    def progress(self) -> float:
        """The part of its network calls that were made, 0 to 1."""
        return min(1.0, sum(self.at.values()) / max(1, self.rows * self.pictures))

    @property
    def warnings(self) -> list[str]:
        """What whoever asked for the pictures should know of them."""
        return [cut.message for cut in self.cuts]

    @property
    def queue_seconds(self) -> float:
        """How long it waited for its first row, or waits."""
        return (self.started or time.monotonic()) - self.made

    def facts(self) -> dict[str, Any]:
        """What anybody may know of it: no prompt, no picture."""
        return {
            "id": self.id,
            "api": self.api,
            "state": "waiting" if self.started is None else "running",
            "pictures": self.pictures,
            "done": self.done,
            "rows": self.rows,
            "row": max(self.at.values(), default=0),
            "progress": round(self.progress, 4),
            "queue_seconds": round(self.queue_seconds, 3),
            "seconds": round(time.monotonic() - self.made, 3),
        }


class Board:
    """All entries, oldest first."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def __iter__(self) -> Iterator[Entry]:
        return iter(tuple(self._entries.values()))

    @contextmanager
    def showing(self, entry: Entry) -> Iterator[Entry]:
        """List a request while somebody waits for it; when nobody does any more its ticket is cancelled."""
        self._entries[id(entry)] = entry
        try:
            yield entry
        finally:
            del self._entries[id(entry)]
            entry.ticket.cancel()
