"""The models of one server: which one a request names, and that it is loaded while the request needs it.

The event loop alone changes what is here, but for the thread that loads and drops, one model at a time.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack

from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from latentrt.serve.core.errors import SOON, Draining, ModelFailed, ModelLoading, QueueFull
from latentrt.serve.core.handle import Handle
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http.catalog import unknown
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.generation import LOOK, Context, left
from latentrt.serve.http.models.entry import ON_DEMAND, Entry
from latentrt.serve.http.models.loader import Loader, Open
from latentrt.serve.process.metrics import Metrics

_CHOICES = 1024  # clients of A1111's API whose model is remembered


class Models:
    """All models of a server; the first is the one that requests get which name none.

    Args:
        entries: the models; the first is loaded.
        open, metrics, room, idle: as of `Loader`.

    Attributes:
        entries: the models.
        loader: loads and drops them.
        created: when the server began, in seconds since 1970.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        open: Open,
        metrics: Metrics,
        *,
        room: int | None = None,
        idle: float | None = None,
    ) -> None:
        self.entries, self.loader = tuple(entries), Loader(entries, open, metrics, room, idle)
        named = [(name, one) for one in self.entries for name in (one.name, *one.aliases)]
        self._names = dict(named) | {one.name: one for one in self.entries}
        self._chosen: OrderedDict[str, Entry] = OrderedDict()
        self.created = int(time.time())
        self._draining = self._ended = False

    @classmethod
    def of(cls, context: Context) -> Models:
        """Return those of a server with one model, which is loaded and stays."""
        catalog = context.catalog

        def never(name: str) -> AbstractContextManager[Context]:
            raise AssertionError(f"{name} is loaded")

        entry = Entry(catalog.name, catalog.settings, 0, catalog.names[1:], context, ExitStack())
        return cls([entry], never, context.metrics)

    # ---- Names

    @property
    def several(self) -> bool:
        """Whether there are several models."""
        return len(self.entries) > 1

    @property
    def names(self) -> dict[str, str]:
        """Every name that requests may have for a model, with the model's own."""
        return {name: one.name for name, one in self._names.items()}

    def find(self, name: str | None, param: str = "model") -> Entry:
        """Return the model of a name; None and "" are the first.

        Raises:
            Problem: 404 model_not_found.
        """
        if not name:
            return self.entries[0]
        if name not in self._names:
            raise unknown(param, name, self._names, status=404, code="model_not_found")
        return self._names[name]

    def choose(self, owner: str, name: str) -> None:
        """Remember which model a client of A1111's API has chosen."""
        self._chosen[owner] = self.find(name)
        self._chosen.move_to_end(owner)
        while len(self._chosen) > _CHOICES:
            self._chosen.popitem(last=False)

    def chosen(self, owner: str) -> Entry:
        """Return the model that a client has chosen, or the first."""
        return self._chosen.get(owner, self.entries[0])

    def described(self, entry: Entry) -> Context:
        """Return a model's parts: of its last load where it was dropped, the first's where it was never loaded."""
        context = entry.context or self.entries[0].context
        assert context is not None  # the first is loaded before the server serves
        return context

    # ---- Holding

    async def hold(self, entry: Entry, http: HttpRequest, pictures: int, timeout: float) -> Context:
        """Load a model, if it is not; it stays until `release`.

        Args:
            http: whose client waits for it.
            pictures: that wait for it meanwhile.
            timeout: seconds; not more than the model's `queue_timeout`.

        Raises:
            Draining, QueueFull, ModelFailed, ModelLoading: it is not loaded now.
            ClientDisconnect: the client has left.
        """
        within = min(entry.settings.queue_timeout, timeout)
        end, pictures = time.monotonic() + within, min(pictures, entry.settings.queue)
        if self._draining and entry.state != "draining":  # else its scheduler refuses
            raise Draining("the server is ending", needed="one that runs", fix="send the request to another")
        while entry.opened is None or entry.yields:
            if not await self._wait(entry, http, pictures, end):
                others = [one.name for one in self.entries if one.scheduler and one.busy and one is not entry]
                found = f"the model {entry.name} was not loaded" + (f" beside {', '.join(others)}" if others else "")
                raise ModelLoading(found, needed=f"within {within:g} s", fix="try again later", retry_after=SOON)
        entry.held += 1
        entry.used = time.monotonic()
        return self.described(entry)

    async def drop(self, entry: Entry) -> None:
        """Drop a model, if it is loaded; the next request that needs it loads it again.

        Raises:
            Problem: 400 where it is the only one, 409 model_in_use where requests wait for it or run.
        """
        if not self.several:
            found, fix = "this server has one model, which stays loaded", "latentrt serve NAME=BUNDLE NAME=BUNDLE"
            raise Problem(found, needed="one of several", fix=fix)
        if not await self.loader.drop(entry):
            found, needed = f"requests need the model {entry.name}", "one that none waits for or runs on"
            raise Problem(found, needed, fix="ask again when they are done", status=409, code="model_in_use")

    def release(self, entry: Entry) -> None:
        """Let a model go that was held."""
        entry.held -= 1
        entry.used = time.monotonic()

    async def _wait(self, entry: Entry, http: HttpRequest, pictures: int, end: float) -> bool:
        """Wait until a load of a model is over; return whether it was by then. Raise as `hold`."""
        now, places = time.monotonic(), entry.settings.queue
        if self._ended:
            raise Draining("the server was stopped", needed="a server that runs", fix="ask again")
        if now < entry.again:
            raise ModelFailed(
                f"the model {entry.name} could not be loaded; the server's log says why",
                needed="one that can be",
                fix="take another model, or try again later",
                retry_after=entry.again - now,
            )
        if entry.waiting + pictures > places:
            found = f"{entry.waiting} pictures wait until {entry.name} is loaded"
            raise QueueFull(found, needed=f"at most {places}", fix="try again later", retry_after=SOON)
        entry.waiting += pictures
        load, gone = self.loader.start(entry), asyncio.ensure_future(left(http))
        try:
            await asyncio.wait({load, gone}, timeout=max(0.0, end - now), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            entry.waiting -= pictures  # no other task runs before the caller holds the model
        if gone.done() and not load.done():
            raise ClientDisconnect
        return load.done()

    # ---- What others see, and the end

    @property
    def loaded(self) -> Iterator[Scheduler]:
        """The schedulers of the models that are loaded."""
        return (one.scheduler for one in self.entries if one.scheduler is not None)

    @property
    def state(self) -> str:
        """Return "ready" where any model takes requests, or else "starting", "draining" or "failed"."""
        if self._draining:
            return "draining"
        states = [scheduler.state for scheduler in self.loaded]
        if not states:  # a request would load one, but those that could not be loaded lately
            states = ["ready" if one.state in ON_DEMAND else one.state for one in self.entries]
        return "ready" if "ready" in states else states[0]

    @property
    def handles(self) -> list[tuple[Entry, Handle]]:
        """All requests that clients wait for, oldest first, with the model of each; none that wait for a load."""
        found = [(one, handle) for one in self.entries if one.scheduler for handle in one.scheduler.handles]
        return sorted(found, key=lambda one: one[1].came)

    def full(self, owner: str) -> QueueFull | None:
        """Return why a client's picture has no place, whatever its model; None where it may have one."""
        full = [None if one.scheduler is None else one.scheduler.full(owner) for one in self.entries]
        return full[0] if all(full) else None

    def drain(self) -> None:
        """Refuse new requests; those that have a place, or wait for a model, are finished."""
        self._draining = True
        for scheduler in self.loaded:
            scheduler.drain()

    async def drained(self, timeout: float) -> bool:
        """Wait until no picture waits or runs, `timeout` seconds at most; then end. Return whether all were done."""
        end = time.monotonic() + timeout
        while not (done := not any(one.works for one in self.entries)) and time.monotonic() < end:
            await asyncio.sleep(LOOK)
        self._ended = True
        for entry in self.entries:
            if entry.loading is not None:
                entry.loading.cancel()
        for scheduler in self.loaded:
            scheduler.close()
        return done

    def close(self) -> None:
        """Drop all models; one that is being loaded is waited for."""
        self._draining = self._ended = True
        self.loader.close()


async def serving(
    http: HttpRequest, name: str | None = None, *, pictures: int | None = None, timeout: float | None = None
) -> Context:
    """Return the parts of the model that a request names, loaded; it stays so until the request is answered, and as
    long as its scheduler has any.

    Args:
        name: one of `Models.names`; None and "" are the first model's.
        pictures: that it asks for.
        timeout: seconds in which it must be done.

    Raises:
        Problem: 404 model_not_found.
        Draining, QueueFull, ModelFailed, ModelLoading: it is not loaded now.
        ClientDisconnect: the client has left.
    """
    models, facts = models_of(http), http.state.facts
    entry, start = models.find(name), time.monotonic()
    if models.several:
        facts["model"] = entry.name
    context = await models.hold(entry, http, pictures or 1, math.inf if timeout is None else timeout)
    facts["held"].callback(models.release, entry)
    waited = time.monotonic() - start
    if waited > LOOK:
        facts["loading_seconds"] = round(waited, 4)
    return context


def models_of(http: HttpRequest) -> Models:
    """Return the models of the server that has this request."""
    models = http.app.state.models
    assert isinstance(models, Models)
    return models
