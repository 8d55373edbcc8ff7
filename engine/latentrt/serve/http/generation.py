"""What the routes of both APIs share: the server's parts, and how a request becomes pictures."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends
from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from latentrt.images.picture import Picture
from latentrt.request import Request
from latentrt.serve.core.handle import Finished, Handle
from latentrt.serve.core.scheduler import Scheduler
from latentrt.serve.http import controls
from latentrt.serve.http.catalog import Catalog
from latentrt.serve.http.errors import Problem
from latentrt.serve.http.images import File, decode, in_thread
from latentrt.serve.process.config import Settings
from latentrt.serve.process.metrics import Metrics

LOOK = 0.02  # seconds between looks at what other threads do
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Context:
    """A server's parts, as of one of its models."""

    scheduler: Scheduler
    settings: Settings
    catalog: Catalog
    metrics: Metrics
    gpu_memory: Callable[[], tuple[int, int]] | None = None


async def _first(http: HttpRequest) -> Context:
    models = http.app.state.models
    context = models.described(models.entries[0])
    assert isinstance(context, Context)
    return context


async def _chosen(http: HttpRequest) -> Context:
    models = http.app.state.models
    context = models.described(models.chosen(http.state.facts["owner"]))
    assert isinstance(context, Context)
    return context


# What there is to choose from, of the first model, or of the one that a client of A1111's API has chosen. To draw, take
# `models.serving`: the model may not be loaded.
Served = Annotated[Context, Depends(_first)]
Chosen = Annotated[Context, Depends(_chosen)]


@asynccontextmanager
async def generating(
    context: Context,
    http: HttpRequest,
    request: Request,
    files: Mapping[str, File],
    *,
    api: str,
    previews: int = 0,
    timeout: float = math.inf,
    task: str | None = None,
) -> AsyncIterator[Handle]:
    """Reserve and submit a request; leaving the block cancels its pictures that are not done.

    Args:
        files: its pictures by use; they are decoded once it has its places.
        previews, api, task: as of `Handle`.
        timeout: seconds in which all pictures must be done.

    Raises:
        LatentrtError: it is refused, or a picture that came with it cannot be read.
    """
    catalog, facts = context.catalog, http.state.facts
    names = [*files, *(["mask"] if "image" in files and files["image"].masks and "mask" in catalog.pictures else [])]
    catalog.check_pictures(names)
    if files and request.hires_scale is not None:
        raise Problem("there are hires_scale and a picture", needed="one of them", param="hires_scale")
    rows, solver = catalog.work(request)
    height, width = catalog.latents.pixels_of(request.height, request.width)
    final = catalog.final_size(request)
    facts.update(n=request.count, steps=request.steps, solver=solver, rows=rows, size=f"{width}x{height}")
    if context.settings.log_prompts:
        facts["prompt"] = request.prompt
    shape = catalog.latents.shape_of(final[1], final[0])
    deadline = time.monotonic() + timeout - facts.get("loading_seconds", 0)
    handle = Handle(request, shape, rows, previews, deadline, facts["id"], facts["owner"], api, task, facts["terms"])
    handle.lanes = catalog.lanes(request)
    context.scheduler.reserve(handle)
    facts["handle"] = handle
    try:
        if files or request.control or request.ip_adapter:
            handle.request = await in_thread(partial(_with_pictures, context, request, files))
        context.scheduler.submit(handle)
        yield handle
    finally:
        context.scheduler.release(handle)
        facts.update(queue_seconds=round(handle.queue_seconds, 4), done=handle.done)
        if handle.cut:
            facts["cut"] = list(handle.cut)


def _with_pictures(context: Context, request: Request, files: Mapping[str, File]) -> Request:
    """Return a request with its pictures read. Raise Problem where one cannot be."""
    catalog, most = context.catalog, context.settings.max_image_pixels
    height, width = catalog.latents.pixels_of(request.height, request.width)
    size, pictures = (width, height), dict[str, Any]()
    if files:
        pictures = decode(
            *(files, size, catalog.latents, most),
            enlarges=catalog.enlarges,
            masked=request.masked,
            resize=request.resize,
        )
    followed = pictures["image"].size if request.mask_crop is not None else size  # maps are of the whole picture
    control, ip_adapter = controls.read(request.control, followed, most), controls.shown(request.ip_adapter, most)
    return replace(request, pictures=pictures, control=control, ip_adapter=ip_adapter)


async def all_pictures(
    http: HttpRequest, handle: Handle, encode: Callable[[Picture], str]
) -> list[tuple[Picture, str]]:
    """Wait for a request's pictures; return each with its file in base64, in order.

    Raises:
        LatentrtError: the request failed.
        ClientDisconnect: the client has left.
    """
    work = asyncio.ensure_future(collected(handle, lambda picture: (picture, encode(picture))))
    gone = asyncio.ensure_future(left(http))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise ClientDisconnect
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)


async def collected(handle: Handle, use: Callable[[Picture], T]) -> list[T]:
    """Wait for a request's pictures; return what a thread made of each, in order. Raise LatentrtError as it failed."""
    made: dict[int, T] = {}
    async for event in handle:
        if isinstance(event, Finished):
            made[event.index] = await in_thread(partial(use, event.image))
    return [made[index] for index in sorted(made)]


async def left(http: HttpRequest) -> None:
    """Wait until the client has left; the body has been read before, or there is none, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
