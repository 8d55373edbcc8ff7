"""/sdapi/v1: enough of A1111's API for its clients; a thin coat over the same drawing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from latentrt.images.metadata import prose
from latentrt.model.edit import STRENGTH
from latentrt.request import Request as EngineRequest
from latentrt.sampling.solvers import SOLVERS
from latentrt.serve.http.board import Entry
from latentrt.serve.http.context import Context, Served
from latentrt.serve.http.drawing import Drawing, Plan, draw
from latentrt.serve.http.pixels import Opener, Source, encode, from_base64, in_thread
from latentrt.serve.http.problems import Problem
from latentrt.serve.http.routes import Media, errors
from latentrt.serve.http.sd_wire import (
    IDLE,
    SAMPLERS,
    SCHEDULERS,
    Checkpoint,
    Images,
    ImageToImage,
    ProgressReport,
    Sampler,
    Scheduler,
    State,
    TextToImage,
)

router = APIRouter(prefix="/sdapi/v1", tags=["A1111"], route_class=Media, responses=errors(401))
_DRAWN = {200: {"model": Images}, **errors(400, 401, 404, 408, 409, 413, 415, 429, 500, 503, 504)}
API = "sdapi"
PREVIEWS = 3  # of a picture whose client can ask after it by its task
# What the catalogue calls by OpenAI's names.
_NAMES = {
    "n": "batch_size",
    "num_inference_steps": "steps",
    "guidance_scale": "cfg_scale",
    "size": "width",
    "scheduler": "sampler_name",
    "strength": "denoising_strength",
    "model": "sd_model_checkpoint",
    "image": "init_images",
}


@router.get("/options")
async def options(context: Served) -> dict[str, Any]:
    """The few that clients read."""
    return {"sd_model_checkpoint": context.catalog.name, "sd_checkpoint_hash": "", "samples_format": "png"}


@router.post("/options", responses=errors(400, 404, 415))
async def set_options(values: dict[str, Any], context: Served) -> None:
    """Clients write all options back to choose a checkpoint; there is one, and nothing else to set."""
    _check_model(context, values.get("sd_model_checkpoint"))


@router.get("/sd-models")
async def sd_models(context: Served) -> list[Checkpoint]:
    """The model under its own name."""
    name = context.catalog.name
    return [Checkpoint(title=name, model_name=name, filename=name)]


@router.get("/samplers")
async def samplers() -> list[Sampler]:
    """By A1111's names, then by ours."""
    known = [Sampler(name=name, aliases=[ours], options={}) for name, (ours, _) in SAMPLERS.items()]
    taken = {ours for ours, _ in SAMPLERS.values()}
    return known + [Sampler(name=name, aliases=[], options={}) for name in SOLVERS if name not in taken]


@router.get("/schedulers")
async def schedulers() -> list[Scheduler]:
    """How noise levels may be spaced."""
    return [Scheduler(name=name.lower(), label=name) for name in SCHEDULERS]


@router.post("/txt2img", responses=_DRAWN, response_class=JSONResponse)
async def txt2img(wanted: TextToImage, http: Request, context: Served) -> JSONResponse:
    """Draw pictures from a prompt."""
    own = context.catalog.own
    return await _answer(context, http, wanted, (wanted.width or own[0], wanted.height or own[1]))


@router.post("/img2img", responses=_DRAWN, response_class=JSONResponse)
async def img2img(wanted: ImageToImage, http: Request, context: Served) -> JSONResponse:
    """Draw pictures from a prompt and a picture; with a mask only where it is white."""
    most = context.settings.max_image_bytes
    source = Source(
        _opener(wanted.init_images[0], "init_images", most),
        _opener(wanted.mask, "mask", most) if wanted.mask else None,
        mask_alpha=False,
        mask_inverted=bool(wanted.inpainting_mask_invert),
        names=("init_images", "mask"),
    )
    strength = STRENGTH if wanted.denoising_strength is None else wanted.denoising_strength
    own = context.catalog.own
    size = wanted.width or own[0], wanted.height or own[1]
    return await _answer(context, http, wanted, size, source, strength)


@router.get("/progress")
async def progress(
    context: Served, http: Request, id_task: str | None = None, skip_current_image: bool = False
) -> ProgressReport:
    """Of one task, or of the oldest there is."""
    entries = [entry for entry in _own(context, http) if id_task is None or entry.task == id_task]
    if not entries:
        return ProgressReport(progress=0.0, eta_relative=0.0, state=State())
    entry = next((entry for entry in entries if entry.started is not None), entries[0])
    image = None
    if entry.preview is not None and not skip_current_image:
        image = await in_thread(partial(encode, entry.preview, "png"))
    taken = time.monotonic() - entry.made - entry.queue_seconds
    part = entry.progress
    state = State(
        job=entry.task or entry.id,
        job_count=entry.pictures,
        job_no=entry.done,
        sampling_step=max(entry.at.values(), default=0),
        sampling_steps=entry.rows,
    )
    eta = taken / part * (1 - part) if part else 0.0
    return ProgressReport(progress=part, eta_relative=eta, state=state, current_image=image)


@router.post("/interrupt")
async def interrupt(context: Served, http: Request, id_task: str | None = None) -> dict[str, Any]:
    """Give up one task, or all that this key's A1111 clients have; never anybody else's."""
    for entry in _own(context, http):
        if id_task is None or entry.task == id_task:
            entry.ticket.cancel()
    return {}


def _opener(text: str, param: str, most: int) -> Opener:
    return lambda: BytesIO(from_base64(text, param, most))


def _own(context: Context, http: Request) -> list[Entry]:
    owner = http.scope["state"]["facts"]["owner"]
    return [entry for entry in context.board if entry.api == API and entry.owner == owner]


def _check_model(context: Context, name: object) -> None:
    if name is not None:
        context.catalog.model(str(name))


async def _answer(
    context: Context,
    http: Request,
    wanted: TextToImage,
    size: tuple[int, int],
    source: Source | None = None,
    strength: float | None = None,
) -> JSONResponse:
    _check_idle(wanted)
    solver, options = _solver(wanted)
    with _renamed():
        request = _request(context, wanted, size, solver, strength, options)
        previews = PREVIEWS if wanted.force_task_id else 0
        plan = Plan(request, context.catalog.name, API, previews=previews, source=source, task=wanted.force_task_id)
        drawn = await draw(context, http, plan)
    parameters = wanted.model_dump(mode="json", include=set(TextToImage.model_fields))
    images = [one.data for one in drawn.pictures] if wanted.send_images is not False else []
    return JSONResponse({"images": images, "parameters": parameters, "info": json.dumps(_info(drawn, plan, wanted))})


@contextmanager
def _renamed() -> Iterator[None]:
    """Refusals name fields as they are called here."""
    try:
        yield
    except Problem as problem:
        problem.param = _NAMES.get(problem.param or "", problem.param)
        raise


def _request(
    context: Context,
    wanted: TextToImage,
    size: tuple[int, int],
    solver: str | None,
    strength: float | None,
    options: dict[str, Any],
) -> EngineRequest:
    _check_model(context, (wanted.override_settings or {}).get("sd_model_checkpoint"))
    catalog = context.catalog
    return catalog.request(
        wanted.prompt,
        negative_prompt=wanted.negative_prompt,
        n=(wanted.batch_size or 1) * (wanted.n_iter or 1),
        size=catalog.sides(*size),
        steps=wanted.steps,
        guidance=wanted.cfg_scale,
        scheduler=solver,
        seed=None if wanted.seed in (None, -1) else wanted.seed,
        strength=strength,
        options=options,
    )


def _check_idle(wanted: TextToImage) -> None:
    """Refuse what would make another picture than the one that is drawn here."""
    for name, value in {**(wanted.override_settings or {}), **(wanted.model_extra or {})}.items():
        if value is not None and value not in IDLE.get(name, (value,)):
            raise Problem(f"{name} is set", needed="what is supported here", fix=f"leave {name} out", param=name)


def _solver(wanted: TextToImage) -> tuple[str | None, dict[str, Any]]:
    """Our solver and its settings for A1111's sampler and scheduler."""
    name = wanted.sampler_name or wanted.sampler_index
    spacing = wanted.scheduler or "Automatic"
    labels = {label.lower(): label for label in SCHEDULERS}
    if spacing.lower() not in labels:
        raise Problem(
            f"there is no scheduler {spacing[:100]!r}",
            needed=f"one of {', '.join(SCHEDULERS)}",
            fix="take one of these, or leave it out",
            param="scheduler",
        )
    spacing = labels[spacing.lower()]
    if name and name.endswith(" Karras"):  # as it was written before A1111 1.9
        name, spacing = name.removesuffix(" Karras"), "Karras"
    usual = ""
    if name in SAMPLERS:
        name, usual = SAMPLERS[name]
    settings = dict(SCHEDULERS[usual if spacing == "Automatic" and usual else spacing])
    if wanted.eta is not None and name in SOLVERS and "eta" in SOLVERS[name].arguments:
        settings["eta"] = wanted.eta
    return name, settings


def _info(drawing: Drawing, plan: Plan, wanted: TextToImage) -> dict[str, Any]:
    """What A1111's clients parse: how each picture was made."""
    request, drawn = plan.request, drawing.pictures
    seeds = [one.seed for one in drawn]
    width, height = plan.size
    return {
        "prompt": request.prompt,
        "all_prompts": [request.prompt] * len(drawn),
        "negative_prompt": request.negative_prompt or "",
        "all_negative_prompts": [request.negative_prompt or ""] * len(drawn),
        "seed": request.seed,
        "all_seeds": seeds,
        "subseed": request.seed,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": width,
        "height": height,
        "sampler_name": wanted.sampler_name or drawn[0].picture.info["latentrt"]["solver"],
        "cfg_scale": request.guidance,
        "steps": request.steps,
        "batch_size": request.count,
        "denoising_strength": request.strength,
        "sd_model_name": plan.model,
        "infotexts": [prose(one.picture.info["latentrt"], one.picture.size) for one in drawn],
        "index_of_first_image": 0,
        "extra_generation_params": {},
        **({"warnings": drawing.warnings} if drawing.warnings else {}),
    }
