"""Loads models when they are needed and drops those that are not, one at a time, within the room that there is."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress

from latentrt.runtime.machine.memory import free_memory, give_back, resident_memory
from latentrt.serve.core.errors import ModelFailed
from latentrt.serve.core.rules.room import Resident, to_drop
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http.generation import LOOK, Context
from latentrt.serve.http.models.entry import Entry
from latentrt.serve.process.config import MIB
from latentrt.serve.process.logs import logger
from latentrt.serve.process.metrics import Metrics

PATIENCE = 10.0  # seconds that a model waits for room before requests for those that have it wait too
AGAIN = 30.0  # seconds after a load that failed before the next one is tried
Open = Callable[[str], AbstractContextManager[Context]]


class Loader:
    """Loads and drops; the event loop alone calls it, and its thread does the work.

    Args:
        entries: all models.
        open: loads one by its name, for as long as it is needed; called in the thread.
        metrics: of any of them.
        room: bytes that all that are loaded may take; None: any number.
        idle: seconds after which one that nobody needs is dropped; None: never.
    """

    def __init__(
        self, entries: Sequence[Entry], open: Open, metrics: Metrics, room: int | None, idle: float | None
    ) -> None:
        self._entries, self._open, self._metrics, self._room, self._idle = entries, open, metrics, room, idle
        self._thread = ThreadPoolExecutor(1, "latentrt-models")
        self._turn = asyncio.Lock()

    def open(self, entry: Entry) -> None:
        """Load a model before the server serves.

        Raises:
            LatentrtError: it cannot be loaded.
        """
        before = resident_memory()
        with ExitStack() as stack:
            entry.context = stack.enter_context(self._open(entry.name))
            entry.measure(before)
            entry.opened = stack.pop_all()

    def start(self, entry: Entry) -> asyncio.Task[None]:
        """Return the task that loads a model, or lets one be used again that was to yield; it never raises."""
        entry.loading = entry.loading or asyncio.create_task(self._load(entry))
        return entry.loading

    async def drop(self, entry: Entry) -> bool:
        """Drop a model because a client asks for it; return False where requests wait for it or run."""
        async with self._turn:
            while entry.busy and not entry.needed:
                await asyncio.sleep(LOOK)
            if not entry.busy:
                await self._drop(entry, "asked")
            return entry.opened is None

    async def _load(self, entry: Entry) -> None:
        try:
            async with self._turn:
                if entry.opened is not None:  # it was to be dropped, and was not
                    entry.yields = False
                elif await self._make_room(entry):
                    await self._run(self._opened, entry)
                    if entry.opened is None:
                        await self._run(_give_back)
        finally:
            entry.loading = None

    async def _make_room(self, entry: Entry) -> bool:
        """Drop others until a model has room; return False where nobody waits for it any more."""
        patience = time.monotonic() + PATIENCE
        while (dropped := self._to_drop(self._residents(), entry)) != []:
            if dropped is not None:  # one alone: meanwhile others may be needed
                await self._drop(self._named(dropped)[0], "room")
                continue
            if not entry.waiting:
                return False
            if time.monotonic() > patience:
                unbusy = [one._replace(busy=False) for one in self._residents()]
                for one in self._named(self._to_drop(unbusy, entry) or ()):
                    one.yields |= not one.waiting  # those that waited until it was loaded have it first
            await asyncio.sleep(LOOK)
        return True

    def _to_drop(self, residents: Sequence[Resident], entry: Entry) -> list[str] | None:
        """Return the names of `to_drop`, where the room ends at the latest with what the system has left."""
        room, free = self._room, free_memory()
        if room is not None and free is not None:
            room = min(room, sum(one.bytes for one in residents) + free)
        return to_drop(residents, entry.bytes, room)

    def _residents(self) -> list[Resident]:
        loaded = (one for one in self._entries if one.opened is not None)
        return [Resident(one.name, one.bytes, one.used, one.busy) for one in loaded]

    def _named(self, names: Sequence[str]) -> list[Entry]:
        return [one for name in names for one in self._entries if one.name == name]

    def _opened(self, entry: Entry) -> None:
        """Load a model, in the thread; what raises is written into the log."""
        start, before, metrics = time.monotonic(), resident_memory(), self._metrics.of(entry.name)
        with ExitStack() as stack:
            try:
                context = stack.enter_context(self._open(entry.name))
                _settle(context.scheduler, entry.name)
            except Exception as error:
                entry.again = time.monotonic() + AGAIN
                metrics.loaded(None)
                logger().error("a model could not be loaded", model=entry.name, again_seconds=AGAIN, exc_info=error)
                return
            seconds = time.monotonic() - start
            entry.measure(before)
            entry.context, entry.used, entry.yields = context, time.monotonic(), False
            entry.opened = stack.pop_all()
        metrics.loaded(seconds)
        logger().info("loaded", model=entry.name, seconds=round(seconds, 2), mib=entry.bytes // MIB)

    async def _drop(self, entry: Entry, why: str) -> None:
        stack, entry.opened, entry.yields = entry.opened, None, False
        if stack is not None and entry.context is not None:
            await self._run(_closed, stack, entry.context)
            logger().info("dropped", model=entry.name, why=why, mib=entry.bytes // MIB)

    async def _run(self, work: Callable[..., None], *arguments: object) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Drop models that nobody needs, for as long as the block lasts."""
        task = None if self._idle is None else asyncio.create_task(self._watch(self._idle))
        try:
            yield
        finally:
            if task is not None:
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task

    async def _watch(self, idle: float) -> None:
        while True:
            await asyncio.sleep(min(1.0, idle / 4))
            async with self._turn:
                for entry in self._entries:
                    now = time.monotonic()
                    if entry.busy:
                        entry.used = now
                    elif entry.opened is not None and now - entry.used > idle:
                        await self._drop(entry, "idle")

    def close(self) -> None:
        """Drop all models; one that is being loaded is waited for."""
        self._thread.shutdown()
        for entry in self._entries:
            if entry.opened is not None:
                entry.opened.close()
                entry.opened = None


def _settle(scheduler: Scheduler, name: str) -> None:
    """Wait for the first self-check. Raise ModelFailed where it fails."""
    while scheduler.state == "starting":
        time.sleep(LOOK)
    if scheduler.state != "ready":
        raise ModelFailed(f"the self-check of {name} failed", needed="one that passes", fix="latentrt verify BUNDLE")


def _closed(stack: ExitStack, context: Context) -> None:
    """Close a model, and give back what it held; what raises is written into the log."""
    try:
        stack.close()
    except Exception as error:
        logger().error("a model could not be closed", model=context.catalog.name, exc_info=error)
    context.catalog.forget()
    _give_back()


def _give_back() -> None:
    """Give back what a model held that is gone."""
    gc.collect()
    give_back()
