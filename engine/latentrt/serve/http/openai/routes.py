"""/v1: the OpenAI Images API."""

from __future__ import annotations

import json
import math
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Form, UploadFile
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from latentrt.errors import RequestError
from latentrt.model.given import MASKED_STRENGTH, STRENGTH
from latentrt.request import Request
from latentrt.serve.core.handle import Handle, Preview
from latentrt.serve.http.background.schema import JobStatus, path_of
from latentrt.serve.http.background.store import Job, jobs_of
from latentrt.serve.http.controls import controls_of, image_prompts_of
from latentrt.serve.http.errors import Problem, answer_to, documented
from latentrt.serve.http.generation import Context, all_pictures, collected, generating
from latentrt.serve.http.images import (
    File,
    Files,
    alpha_mask,
    in_thread,
    may_be_clear,
    shape_of,
    too_many_bytes,
)
from latentrt.serve.http.models.models import Models, models_of, serving
from latentrt.serve.http.openai.answers import Style, seed_of
from latentrt.serve.http.openai.schema import (
    OF_EDITS,
    OWN,
    USAGE,
    EditRequest,
    GenerateRequest,
    ImagesResponse,
    Model,
    ModelList,
    Wanted,
)
from latentrt.serve.http.utf8 import Utf8Response
from latentrt.serve.process.logs import logger
from latentrt.serve.process.webhooks.hosts import Target

router = APIRouter(prefix="/v1", tags=["OpenAI"], responses=documented(400, 401, 404))
_DRAWN = {
    200: {
        "model": ImagesResponse,
        "description": "The pictures; with `stream`, events.",
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
    },
    202: {"model": JobStatus, "description": "With `background`: the job. Location has its path."},
    **documented(400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504),
}


@router.get("/models")
async def list_models(http: HttpRequest) -> ModelList:
    """The models under all their names; `root` is a model's own."""
    models = models_of(http)
    return ModelList(data=[_model(models, name, root) for name, root in models.names.items()])


@router.get("/models/{model:path}", responses=documented(404))
async def retrieve_model(model: str, http: HttpRequest) -> Model:
    """One of these names."""
    models = models_of(http)
    return _model(models, model, models.find(model).name)


@router.post("/images/generations", responses=_DRAWN, response_class=JSONResponse)
async def generate(wanted: GenerateRequest, http: HttpRequest) -> Response:
    """Draw pictures from a prompt."""
    context = await serving(http, wanted.model, pictures=wanted.n, timeout=wanted.timeout)
    request = _request(context, wanted, context.catalog.sizes.of(wanted.size), **_add_ons(context, wanted))
    return await _answer(context, http, wanted, request, {}, "generation")


@router.post("/images/edits", responses=_DRAWN, response_class=JSONResponse)
async def edit(wanted: Annotated[EditRequest, Form(media_type="multipart/form-data")], http: HttpRequest) -> Response:
    """Draw pictures from a prompt and a picture; with a mask only where its alpha is 0, without one only where the
    picture's own is, if it is anywhere.

    Models that enlarge pictures draw each so many times as large as it is; `size` is that of the drawn one.
    """
    context = await serving(http, wanted.model, pictures=wanted.n, timeout=wanted.timeout)
    files, catalog = _files(context, wanted), context.catalog
    if wanted.size in (None, "", "auto"):
        shape = await in_thread(partial(shape_of, files["image"], context.settings.max_image_pixels))
        size = catalog.sizes.fitting(*shape)
    else:
        size = catalog.sizes.of(wanted.size)
    default = await _strength(context, files)
    more = {name: getattr(wanted, name) for name in OF_EDITS}
    more |= _add_ons(context, wanted)
    request = _request(context, wanted, size, strength=wanted.strength or default, **more)
    return await _answer(context, http, wanted, request, files, "edit")


def _add_ons(context: Context, wanted: GenerateRequest | EditRequest) -> dict[str, Any]:
    """Return the settings of add-ons that bring pictures. Raise as `controls_of` and `image_prompts_of`."""
    catalog, most = context.catalog, context.settings.max_image_bytes
    return {
        "control": controls_of(wanted.control, catalog, most),
        "ip_adapter": image_prompts_of(wanted.ip_adapter, catalog, most),
    }


def _model(models: Models, name: str, root: str) -> Model:
    return Model(id=name, created=models.created, owned_by="latentrt", root=root)


def _request(context: Context, wanted: Wanted, size: tuple[int, int], **more: Any) -> Request:
    if wanted.kind == "png" and wanted.output_compression not in (None, 100):
        raise Problem(
            f"output_compression is {wanted.output_compression} with png",
            needed="jpeg or webp",
            fix="set output_format, or leave output_compression out",
            param="output_compression",
        )
    return context.catalog.request(
        wanted.prompt or None,
        negative_prompt=wanted.negative_prompt,
        n=wanted.n,
        size=size,
        steps=wanted.num_inference_steps,
        guidance=wanted.guidance_scale,
        scheduler=wanted.scheduler,
        seed=wanted.seed,
        class_label=wanted.class_label,
        lora=_lora(wanted),
        **{name: getattr(wanted, name) for name in OWN},
        **more,
    )


def _lora(wanted: Wanted) -> Any:
    """Return the strengths of a request's LoRAs; a form has them as JSON. Raise Problem."""
    given = getattr(wanted, "lora", None)
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given) if given else None
    except (ValueError, RecursionError) as error:
        raise Problem("lora is no JSON", needed='strengths by name, as {"name": 0.8}', param="lora") from error


def _files(context: Context, wanted: EditRequest) -> Files:
    """Return the files of an edit, by use."""
    images = [*wanted.image, *wanted.images]
    if len(images) != 1:
        param = "image[]" if wanted.images else "image"
        found = f"{param} has {len(images)} pictures" if images else "image is missing"
        raise Problem(found, needed="one", fix="send one file as image", param=param)
    most = context.settings.max_image_bytes
    files = {}
    for name, upload in (("image", images[0]), ("mask", wanted.mask), ("depth", wanted.depth)):
        if upload is not None and (upload.size or 0) > most:
            raise too_many_bytes(name, most)
        if upload is not None:
            files[name] = File(name, partial(_rewound, upload), alpha_mask if name == "mask" else None)
    if "mask" not in files and "mask" in context.catalog.reads:
        files["image"] = replace(files["image"], masks=True)
    return files


async def _strength(context: Context, files: Files) -> float | None:
    """Return the strength of an edit that names none; None where the model has none, or where only the picture's
    pixels tell whether its alpha is a mask: then the engine chooses.
    """
    if context.catalog.shows_picture:
        return None
    if "mask" in files:
        return MASKED_STRENGTH
    most = context.settings.max_image_pixels
    clear = files["image"].masks and await in_thread(partial(may_be_clear, files["image"], most))
    return None if clear else STRENGTH


def _rewound(upload: UploadFile) -> BinaryIO:
    upload.file.seek(0)
    return upload.file


async def _answer(
    context: Context, http: HttpRequest, wanted: Wanted, request: Request, files: Files, verb: str
) -> Response:
    style = Style.of(wanted, f"{request.width}x{request.height}")
    target = _target(context, http, wanted)
    begun = generating(
        context,
        http,
        request,
        files,
        api=f"{verb}s",
        previews=wanted.previews,
        timeout=wanted.timeout or math.inf,
    )
    if wanted.stream or wanted.background is True:
        # Entered here and left by the stream or the job: a refusal must still be a status, not an event.
        stack = AsyncExitStack()
        handle = await stack.enter_async_context(begun)
        if wanted.stream:
            return _Stream(_events(http, handle, style, f"image_{verb}"), stack, context.settings.heartbeat)
        return _begun(context, http, handle, style, target, stack)
    async with begun as handle:
        drawn = await all_pictures(http, handle, style.encoded)
    return Utf8Response(style.body(((seed_of(picture), file) for picture, file in drawn), handle.warnings))


def _target(context: Context, http: HttpRequest, wanted: Wanted) -> Target | None:
    """Return where a background job's webhook goes. Raise Problem where what is asked for cannot be."""
    if wanted.background is not True:
        if wanted.webhook_url is not None:
            fix = "set background to true"
            raise Problem("there is a webhook_url and no background job", "one", fix, param="webhook_url")
        return None
    if wanted.stream:
        fix = "leave one of them out"
        raise Problem("background and stream are both true", "one of them", fix, param="background")
    if context.settings.most_replicas > 1:
        found = "background is true, and this server has several replicas, which do not know each other's jobs"
        raise Problem(found, needed="an open connection", fix="leave background out", param="background")
    if wanted.webhook_url is None:
        return None
    try:
        return jobs_of(http).webhooks.hosts.target(wanted.webhook_url)
    except RequestError as error:
        raise Problem(error.found, error.needed, error.fix, param="webhook_url") from error


def _begun(
    context: Context, http: HttpRequest, handle: Handle, style: Style, target: Target | None, begun: AsyncExitStack
) -> JSONResponse:
    """Return the answer to a request that goes on as a job."""
    jobs, facts = jobs_of(http), http.state.facts
    job = Job(facts["owner"], context.catalog.name, style, context.scheduler, handle, facts, http.scope, target)
    jobs.begin(job, begun, partial(collected, handle, style.drawn))
    location = path_of(job.id).removeprefix("/v1/images/")  # relative: a proxy may have a prefix
    return JSONResponse(jobs.status(job).model_dump(mode="json"), 202, {"location": location})


class _Stream(EventSourceResponse):
    """Events with heartbeats; its pictures are cancelled however it ends, even before its first event."""

    def __init__(self, events: AsyncIterator[ServerSentEvent], begun: AsyncExitStack, heartbeat: float) -> None:
        super().__init__(events, ping=heartbeat, sep="\n")
        self._begun = begun

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._begun:
            await super().__call__(scope, receive, send)


async def _events(http: HttpRequest, handle: Handle, style: Style, kind: str) -> AsyncIterator[ServerSentEvent]:
    """Yield partial_image and completed events, or an error as the last one."""
    try:
        async for event in handle:
            data = {
                "b64_json": await in_thread(partial(style.encoded, event.image)),
                "index": event.index,
                "quality": "auto",
                **style.own,
            }
            if isinstance(event, Preview):
                yield _event(f"{kind}.partial_image", {**data, "partial_image_index": event.number})
            else:
                seed = seed_of(event.image)
                warnings = {"warnings": handle.warnings} if handle.warnings else {}
                yield _event(f"{kind}.completed", {**data, "usage": USAGE, "seed": seed, **warnings})
    except Exception as error:
        answer = answer_to(error)
        if answer.status == 500:
            logger().error("a request failed", id=handle.id, exc_info=error)
        http.state.facts["outcome"] = answer.code
        yield _event("error", answer.body)


def _event(kind: str, data: dict[str, Any]) -> ServerSentEvent:
    stamped = {"type": kind, "created_at": int(time.time()), **data}
    return ServerSentEvent(json.dumps(stamped), event=kind, sep="\n")
