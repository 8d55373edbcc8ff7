"""/sdapi/v1: what there is to choose from, options, and memory."""

from __future__ import annotations

import os
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest

from latentrt.errors import LatentrtError
from latentrt.model.prompts.embeddings import embeddings_of, read_embedding
from latentrt.serve.http.errors import documented
from latentrt.serve.http.generation import Chosen, Served
from latentrt.serve.http.images import in_thread
from latentrt.serve.http.models.models import models_of, serving
from latentrt.serve.http.sdapi import options as known
from latentrt.serve.http.sdapi.answers import Error
from latentrt.serve.http.sdapi.controlnet import SCRIPT
from latentrt.serve.http.sdapi.drawing import UPSCALERS
from latentrt.serve.http.sdapi.extras import upscalers_of
from latentrt.serve.http.sdapi.fields import renamed
from latentrt.serve.http.sdapi.samplers import SPACINGS, offered
from latentrt.serve.http.sdapi.schema import (
    Checkpoint,
    EmbeddingItem,
    Embeddings,
    LoraItem,
    Memory,
    Named,
    SamplerItem,
    SchedulerItem,
    Scripts,
    UpscalerItem,
)

router = APIRouter()


@router.get("/options")
async def options(context: Chosen) -> dict[str, Any]:
    """Those that change pictures, as they are for requests that override none."""
    return known.present(context.catalog.name)


@router.post("/options", responses=documented(400, 404, 415, 422, model=Error))
async def set_options(values: dict[str, Any], http: HttpRequest) -> None:
    """Choose a checkpoint for this client's later requests, by `sd_model_checkpoint`; it is loaded. Options that would
    change pictures are refused unless they hold anyway.
    """
    models, name = models_of(http), known.options_of(values).sd_model_checkpoint
    with renamed():
        models.find(name)
    known.check_present(values, models.entries[0].name)
    if name:
        await serving(http, name)
        models.choose(http.state.facts["owner"], name)


@router.get("/sd-models")
async def sd_models(http: HttpRequest) -> list[Checkpoint]:
    """The models under their own names."""
    names = [one.name for one in models_of(http).entries]
    return [Checkpoint(title=name, model_name=name, filename=name) for name in names]


@router.post("/refresh-checkpoints")
@router.post("/refresh-vae")
@router.post("/refresh-loras")
@router.post("/refresh-embeddings")
async def refresh() -> None:
    """Do nothing: what a server offers is known when it starts, and the folder of LoRAs is listed for each request."""


@router.post("/unload-checkpoint", responses=documented(400, 409, model=Error))
async def unload_checkpoint(http: HttpRequest) -> dict[str, str]:
    """Drop the model that this client has chosen, of several, unless requests need it. The next one loads it again."""
    models = models_of(http)
    await models.drop(models.chosen(http.state.facts["owner"]))
    return {}


@router.post("/reload-checkpoint", responses=documented(429, 503, model=Error))
async def reload_checkpoint(http: HttpRequest) -> dict[str, str]:
    """Load the model that this client has chosen, if it is not."""
    await serving(http, models_of(http).chosen(http.state.facts["owner"]).name)
    return {}


@router.get("/samplers")
async def samplers(context: Chosen) -> list[SamplerItem]:
    """By A1111's names, then by ours."""
    found = offered(context.catalog).items()
    return [
        SamplerItem(
            name=name,
            aliases=list(dict.fromkeys([one.solver, *one.aliases])),
            options={"scheduler": one.spacing} if one.spacing else {},
        )
        for name, one in found
    ]


@router.get("/schedulers")
async def schedulers() -> list[SchedulerItem]:
    """How noise levels may be spaced."""
    return [SchedulerItem(name=name.lower(), label=name) for name in SPACINGS]


@router.get("/upscalers")
async def upscalers(context: Chosen) -> list[UpscalerItem]:
    """What /sdapi/v1/extra-single-image enlarges with."""
    return [
        UpscalerItem(name=name, model_name=name if scale > 1 else None, scale=scale)
        for name, scale in upscalers_of(context.catalog).items()
    ]


@router.get("/latent-upscale-modes")
async def latent_upscale_modes() -> list[Named]:
    """What hires fix enlarges with."""
    return [Named(name=name) for name in UPSCALERS]


@router.get("/loras")
async def loras(context: Chosen) -> list[LoraItem]:
    """Those that prompts may name."""
    names = await in_thread(lambda: context.catalog.loras)
    return [LoraItem(name=name, alias=name, path=f"{name}.safetensors") for name in names]


@router.get("/embeddings")
async def embeddings(context: Chosen) -> Embeddings:
    """Those that every prompt may name."""
    return await in_thread(partial(_embeddings, tuple(context.settings.embedding)))


@lru_cache(maxsize=8)
def _embeddings(typed: tuple[str, ...]) -> Embeddings:
    loaded = {}
    for token, path in embeddings_of(typed).items():
        vectors = next(iter(read_embedding(Path(path)).vectors.values()))
        loaded[token] = EmbeddingItem(shape=vectors.shape[1], vectors=vectors.shape[0])
    return Embeddings(loaded=loaded)


@router.get("/sd-vae")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/prompt-styles")
@router.get("/script-info")
@router.get("/extensions")
async def none() -> list[Named]:
    """There are none of these to choose from."""
    return []


@router.get("/scripts")
async def scripts(context: Chosen) -> Scripts:
    """That of ControlNets and IP-Adapters, where there are some."""
    names = [SCRIPT] if context.catalog.controls or context.catalog.ip_adapters else []
    return Scripts(txt2img=names, img2img=names)


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, str]:
    """None of A1111's flags are known."""
    return {}


@router.get("/memory")
async def memory(context: Served) -> Memory:
    """Bytes that this process holds and that the machine has; below `cuda`, `system`, those of the engine's GPU."""
    page = os.sysconf("SC_PAGE_SIZE")
    total, used = os.sysconf("SC_PHYS_PAGES") * page, int(Path("/proc/self/statm").read_text().split()[1]) * page
    return Memory(ram={"free": total - used, "used": used, "total": total}, cuda=_of_gpu(context))


def _of_gpu(context: Served) -> dict[str, Any]:
    if context.gpu_memory is None:
        return {"error": "unavailable"}
    try:
        free, total = context.gpu_memory()
    except LatentrtError as error:
        return {"error": str(error)}
    return {"system": {"free": free, "used": total - free, "total": total}}
