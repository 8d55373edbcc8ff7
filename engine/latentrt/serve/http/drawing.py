"""From a request to its pictures: reserve, decode, submit, follow; and let go when the client does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from fastapi import Request as HttpRequest
from numpy.typing import NDArray
from starlette.requests import ClientDisconnect

from latentrt.images.picture import Picture as Drawn
from latentrt.request import Request
from latentrt.serve.core.ticket import Event, Failed, Order, Picture, Started
from latentrt.serve.http.board import Entry
from latentrt.serve.http.context import Context
from latentrt.serve.http.pixels import Source, decode, encode, in_thread
from latentrt.serve.http.problems import Problem


@dataclass(frozen=True, slots=True)
class Plan:
    """A request that was checked, and how its pictures are wanted."""

    request: Request
    model: str
    api: str
    kind: str = "png"
    quality: int | None = None
    previews: int = 0
    timeout: float | None = None
    source: Source | None = None
    task: str | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Width and height."""
        return self.request.width or 0, self.request.height or 0  # the catalogue has set both


@dataclass(frozen=True, slots=True)
class Made:
    """A finished picture: the engine's, and its file in base64."""

    picture: Drawn
    data: str

    @property
    def seed(self) -> int:
        """The seed that makes it again."""
        return int(self.picture.info["latentrt"]["seed"])


@dataclass(frozen=True, slots=True)
class Drawing:
    """All pictures of a plan, in order, and what is to be said of them."""

    pictures: list[Made]
    warnings: list[str]


@asynccontextmanager
async def begun(context: Context, http: HttpRequest, plan: Plan) -> AsyncIterator[Entry]:
    """Submit the plan; leaving the block lets go of whatever is not done.

    Raises:
        LatentrtError: it is refused, or a picture that came with it cannot be read.
    """
    facts: dict[str, Any] = http.scope["state"]["facts"]
    entry = await _submit(context, plan, facts)
    with context.board.showing(entry):
        try:
            yield entry
        finally:
            facts["queue_seconds"] = round(entry.queue_seconds, 4)
            facts["done"] = entry.done
            if entry.cuts:
                facts["cut"] = [cut.field for cut in entry.cuts]


async def _submit(context: Context, plan: Plan, facts: dict[str, Any]) -> Entry:
    request, source = plan.request, plan.source
    if source is not None and not context.catalog.edits:
        raise Problem(
            "there is a picture", needed="a prompt alone: this server edits none", fix="leave it out", param="image"
        )
    rows, solver = context.catalog.work(request)
    facts.update(n=request.count, steps=request.steps, solver=solver, rows=rows)
    facts["size"] = "{}x{}".format(*plan.size)
    if context.settings.log_prompts:
        facts["prompt"] = request.prompt
    deadline = None if plan.timeout is None else time.monotonic() + plan.timeout
    image: NDArray[np.uint8] | None = None
    mask: NDArray[np.uint8] | None = None
    reserved = context.service.reserve(
        request.count,
        rows=rows,
        deadline=deadline,
        shape=context.catalog.latent_shape(plan.size),
    )
    with reserved as place:
        if source is not None:
            image, mask = await decode(
                source, plan.size, context.catalog.spec.latents, context.settings.max_image_pixels
            )
        order = Order(
            request=request,
            model=plan.model,
            previews=plan.previews,
            deadline=deadline,
            image=image,
            mask=mask,
            strength=1.0 if request.strength is None else request.strength,
            id=facts["id"],
        )
        ticket = place.submit(order)
    return Entry(facts["id"], ticket, request.count, rows, plan.api, plan.task, facts["owner"])


async def follow(context: Context, entry: Entry) -> AsyncGenerator[Event, None]:
    """A ticket's events, each noted on the board; a failure is raised.

    Raises:
        LatentrtError: as the service says.
    """
    async for event in entry.ticket:
        waited = entry.started is None
        entry.note(event)
        if isinstance(event, Started) and waited:
            context.metrics.begun(entry.queue_seconds)
        if isinstance(event, Failed):
            raise event.error
        yield event


async def draw(context: Context, http: HttpRequest, plan: Plan) -> Drawing:
    """All pictures of a plan.

    Raises:
        LatentrtError: the first failure.
        ClientDisconnect: nobody waits for them any more.
    """
    async with begun(context, http, plan) as entry:
        work = asyncio.ensure_future(_collect(context, entry, plan))
        gone = asyncio.ensure_future(_gone(http))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return Drawing(work.result(), entry.warnings)
        finally:
            for task in (work, gone):
                task.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)


async def made(event: Picture, plan: Plan) -> Made:
    """A finished picture as the client wants it."""
    return Made(event.image, await in_thread(partial(encode, event.image, plan.kind, plan.quality)))


async def _collect(context: Context, entry: Entry, plan: Plan) -> list[Made]:
    pictures: dict[int, Made] = {}
    async with aclosing(follow(context, entry)) as events:
        async for event in events:
            if isinstance(event, Picture):
                pictures[event.index] = await made(event, plan)
    return [pictures[index] for index in sorted(pictures)]


async def _gone(http: HttpRequest) -> None:
    """Returns when the client has hung up; the body has been read before, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
