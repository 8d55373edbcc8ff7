"""One model of a server: whether it is loaded, who needs it, and what it takes."""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, field

from latentrt.runtime.machine.memory import resident_memory
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http.generation import Context
from latentrt.serve.process.config import Settings

ON_DEMAND = "unloaded", "loading"  # states of models that requests may wait for


@dataclass(slots=True, eq=False)
class Entry:
    """One model.

    Attributes:
        name: for clients, in logs and in metrics; `aliases` are its other names.
        settings: its own.
        bytes: of memory that it takes: at first a guess, then as measured.
        context: its parts; a dropped model keeps them, without weights, so that clients see its sizes.
        opened: closes it; None where it is not loaded.
        loading: loads it.
        waiting: pictures that wait for that.
        held: requests that need it and are not answered yet.
        used: the `time.monotonic()` at which it was needed last.
        again: that at which it may be tried again, after it could not be loaded.
        yields: whether requests wait, though it is loaded, so that another model gets room.
    """

    name: str
    settings: Settings
    bytes: int = 0
    aliases: tuple[str, ...] = ()
    context: Context | None = None
    opened: ExitStack | None = None
    loading: asyncio.Task[None] | None = None
    waiting: int = 0
    held: int = 0
    used: float = field(default_factory=time.monotonic)
    again: float = -math.inf
    yields: bool = False

    @property
    def scheduler(self) -> Scheduler | None:
        """Its scheduler, where it is loaded."""
        return None if self.opened is None or self.context is None else self.context.scheduler

    @property
    def needed(self) -> bool:
        """Whether requests wait for it or run."""
        waits = self.waiting > 0 and not self.yields
        return waits or self.held > 0 or (self.scheduler is not None and bool(self.scheduler.handles))

    @property
    def busy(self) -> bool:
        """Whether it must stay: it is needed, or a call goes on, which only its scheduler watches."""
        return self.needed or (self.scheduler is not None and self.scheduler.calling)

    @property
    def state(self) -> str:
        """Return its scheduler's state; else "unloaded", "loading", or "failed" where loading it failed lately."""
        if self.scheduler is not None:
            return self.scheduler.state
        if self.loading is not None:
            return "loading"
        return "failed" if time.monotonic() < self.again else "unloaded"

    @property
    def running(self) -> int:
        """Pictures that have lanes, or had them."""
        return 0 if self.scheduler is None else self.scheduler.running

    @property
    def pictures(self) -> int:
        """Pictures that wait, for lanes or until it is loaded."""
        return self.waiting + (0 if self.scheduler is None else self.scheduler.waiting)

    @property
    def works(self) -> bool:
        """Whether pictures wait or run, or are about to: those that waited until it was loaded."""
        coming = self.held > 0 and self.state == "ready"
        return coming or self.pictures + self.running > 0

    def measure(self, before: int | None) -> None:
        """Take what the process holds more than `before` for the model's size, but at least half of what it was thought
        to be: others may have freed something meanwhile.
        """
        now = resident_memory()
        if now is not None and before is not None:
            self.bytes = max(now - before, self.bytes // 2)
