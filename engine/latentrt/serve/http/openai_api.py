"""/v1: the OpenAI Images API."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Form, Request, UploadFile
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from latentrt.model.edit import MASKED_STRENGTH, STRENGTH
from latentrt.serve.core.ticket import Picture, Preview
from latentrt.serve.http.board import Entry
from latentrt.serve.http.context import Context, Served
from latentrt.serve.http.drawing import Drawing, Plan, begun, draw, follow, made
from latentrt.serve.http.pixels import Opener, Source, encode, in_thread, shape_of, too_large
from latentrt.serve.http.problems import Problem, answer_to
from latentrt.serve.http.routes import Media, errors
from latentrt.serve.http.wire import USAGE, EditRequest, GenerateRequest, ImagesResponse, Model, ModelList, Wanted
from latentrt.serve.process.logs import logger

router = APIRouter(prefix="/v1", tags=["OpenAI"], route_class=Media, responses=errors(400, 401, 404))
_DRAWN = {
    200: {
        "model": ImagesResponse,
        "description": "The pictures; with `stream`, events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    **errors(400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504),
}


@router.get("/models")
async def list_models(context: Served) -> ModelList:
    """The model under all its names."""
    return ModelList(data=[_model(context, name) for name in context.catalog.names])


@router.get("/models/{model:path}", responses=errors(404))
async def retrieve_model(model: str, context: Served) -> Model:
    """One of its names."""
    context.catalog.model(model)
    return _model(context, model)


@router.post("/images/generations", responses=_DRAWN, response_class=JSONResponse)
async def generate(wanted: GenerateRequest, http: Request, context: Served) -> Response:
    """Draw pictures from a prompt."""
    plan = _plan(context, wanted, context.catalog.size(wanted.size), "generations")
    return await _answer(context, http, plan, wanted, "image_generation")


@router.post("/images/edits", responses=_DRAWN, response_class=JSONResponse)
async def edit(
    wanted: Annotated[EditRequest, Form(media_type="multipart/form-data")], http: Request, context: Served
) -> Response:
    """Draw pictures from a prompt and a picture; with a mask only where its alpha is 0."""
    source = _source(context, wanted)
    if wanted.size in (None, "", "auto"):
        shape = await in_thread(partial(shape_of, source.image, "image", context.settings.max_image_pixels))
        size = context.catalog.fitting(*shape)
    else:
        size = context.catalog.size(wanted.size)
    usual = STRENGTH if source.mask is None else MASKED_STRENGTH
    strength = usual if wanted.strength is None else wanted.strength
    plan = _plan(context, wanted, size, "edits", source, strength)
    return await _answer(context, http, plan, wanted, "image_edit")


def _model(context: Context, name: str) -> Model:
    return Model(id=name, created=context.created, owned_by="latentrt", root=context.catalog.name)


def _plan(
    context: Context,
    wanted: Wanted,
    size: tuple[int, int],
    api: str,
    source: Source | None = None,
    strength: float | None = None,
) -> Plan:
    kind = wanted.output_format or "png"
    if kind == "png" and wanted.output_compression not in (None, 100):
        raise Problem(
            f"output_compression is {wanted.output_compression} with png",
            needed="jpeg or webp",
            fix="set output_format, or leave output_compression out",
            param="output_compression",
        )
    request = context.catalog.request(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        n=wanted.n,
        size=size,
        steps=wanted.num_inference_steps,
        guidance=wanted.guidance_scale,
        scheduler=wanted.scheduler,
        seed=wanted.seed,
        strength=strength,
    )
    return Plan(
        request,
        model=context.catalog.model(wanted.model),
        api=api,
        kind=kind,
        quality=wanted.output_compression,
        previews=wanted.partial_images or 0 if wanted.stream else 0,
        timeout=wanted.timeout,
        source=source,
    )


def _source(context: Context, wanted: EditRequest) -> Source:
    """The files of an edit."""
    files = [*wanted.image, *wanted.images]
    if len(files) != 1:
        raise Problem(
            f"{len(files)} pictures to edit" if files else "image is missing",
            needed="one",
            fix="send one file as image",
            param="image",
        )
    most = context.settings.max_image_bytes
    image = _opener(files[0], "image", most)
    return Source(image, _opener(wanted.mask, "mask", most) if wanted.mask else None)


def _opener(upload: UploadFile, param: str, most: int) -> Opener:
    if (upload.size or 0) > most:
        raise too_large(param, most)

    def opened() -> BinaryIO:
        upload.file.seek(0)
        return upload.file

    return opened


async def _answer(context: Context, http: Request, plan: Plan, wanted: Wanted, kind: str) -> Response:
    safety = wanted.safety_identifier or wanted.user or None
    if not wanted.stream:
        # OpenAI answered its first models with URLs by default, and clients of these still look there.
        urls = (wanted.response_format or ("url" if (wanted.model or "").startswith("dall-e") else "")) == "url"
        return JSONResponse(_response(await draw(context, http, plan), plan, urls, safety))
    # Entered here and left by the stream: a refusal must still be a status, not an event.
    stack = AsyncExitStack()
    entry = await stack.enter_async_context(begun(context, http, plan))
    return _Stream(_events(context, http, plan, entry, kind, safety), stack, context.settings.heartbeat)


class _Stream(EventSourceResponse):
    """Events with heartbeats; whatever ends the stream, even before its first event, lets go of the pictures."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], begun: AsyncExitStack, heartbeat: float) -> None:
        super().__init__(events, ping=heartbeat, ping_message_factory=_heartbeat, sep="\n")
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._begun:
            await super().__call__(scope, receive, send)


def _heartbeat() -> ServerSentEvent:
    return ServerSentEvent(comment="still drawing", sep="\n")


def _response(drawn: Drawing, plan: Plan, urls: bool, safety: str | None) -> dict[str, Any]:
    data = []
    for one in drawn.pictures:
        url = {"url": f"data:image/{plan.kind};base64,{one.data}"} if urls else {}
        data.append({"b64_json": one.data, **url, "seed": one.seed})
    return {
        "created": int(time.time()),
        "data": data,
        "background": "opaque",
        "output_format": plan.kind,
        "size": "{}x{}".format(*plan.size),
        **({"safety_identifier": safety} if safety else {}),
        **({"warnings": drawn.warnings} if drawn.warnings else {}),
    }


async def _events(
    context: Context, http: Request, plan: Plan, entry: Entry, kind: str, safety: str | None
) -> AsyncIterator[ServerSentEvent]:
    """partial_image and completed, or error and nothing after it."""
    facts = http.scope["state"]["facts"]
    look = {
        "background": "opaque",
        "output_format": plan.kind,
        "quality": "auto",
        "size": "{}x{}".format(*plan.size),
    }
    try:
        async with aclosing(follow(context, entry)) as events:
            async for event in events:
                if isinstance(event, Preview):
                    data = await in_thread(partial(encode, event.image, plan.kind, plan.quality))
                    number = {"partial_image_index": event.number, "index": event.index}
                    yield _event(f"{kind}.partial_image", {"b64_json": data, **number, **look})
                elif isinstance(event, Picture):
                    one = await made(event, plan)
                    own: dict[str, Any] = {"usage": USAGE, "index": event.index, "seed": one.seed}
                    own |= {"safety_identifier": safety} if safety else {}
                    own |= {"warnings": entry.warnings} if entry.cuts else {}
                    yield _event(f"{kind}.completed", {"b64_json": one.data, **own, **look})
    except Exception as error:
        answer = answer_to(error)
        if answer.status == 500:
            logger().error("a request failed", id=entry.id, exc_info=error)
        facts["outcome"] = answer.code
        yield _event("error", answer.body)


def _event(kind: str, data: dict[str, Any]) -> ServerSentEvent:
    stamped = {"type": kind, "created_at": int(time.time()), **data}
    return ServerSentEvent(json.dumps(stamped), event=kind, sep="\n")
