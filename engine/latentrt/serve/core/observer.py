"""What the scheduler tells of itself, for metrics."""

from __future__ import annotations


class Observer:
    """Called for everything that happens, between ticks, so it must be quick; this one ignores all of it."""

    def begun(self, waited: float) -> None:
        """A request's first row has run, so many seconds after it came."""

    def ticked(self, seconds: float, lanes: int, pictures: int) -> None:
        """All running pictures moved by a row; `lanes` of the network were used."""

    def staged(self, stage: str, seconds: float) -> None:
        """A piece of work beside the ticks is done: "prepare", "decode" or "preview"."""

    def ended(self, outcome: str, seconds: float) -> None:
        """A picture is "done" or failed with an error's code, so many seconds after it came."""

    def faulted(self, hung: bool) -> None:
        """The engine raised or hung."""
