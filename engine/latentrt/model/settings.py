"""What a request leaves open, filled in for a model, and what it asks that the model cannot do, refused."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from latentrt.errors import RequestError
from latentrt.model.conditioners.adapters import check_adapters
from latentrt.model.conditioners.ip_adapter import check_ip_adapters
from latentrt.model.control import check_request
from latentrt.request import Request

if TYPE_CHECKING:
    from latentrt.model.model import Model

CONDITIONED = (  # fields of a request that some models do not read
    "prompt",
    "negative_prompt",
    "class_label",
    "noise_level",
    "image_guidance",
    "clip_skip",
    "aesthetic_score",
    "negative_aesthetic_score",
)
IMAGE_GUIDANCE = 1.5  # of StableDiffusionInstructPix2PixPipeline


def filled(model: Model, request: Request, others: Collection[str]) -> Request:
    """Return the request with the model's defaults for what it does not set; see `Model.filled`."""
    _check_fields(model, request, others)
    guidance = _guidance(model, request)
    defaults = model.spec.defaults
    steps = defaults.steps if request.steps is None else request.steps
    solver = defaults.solver if request.solver is None else request.solver
    request = replace(request, steps=steps, solver=solver, guidance=guidance)
    check_ip_adapters(request, model.ip_adapters, model.spec.id)
    for one in model.conditioners:
        one.check_settings(request)
    _check_text(model, request)
    check_request(request, model.controls, model.spec.id)
    check_adapters(request, model.adapters)
    if "image_guidance" in model.fields and request.image_guidance is None and guidance > 1:
        return replace(request, image_guidance=IMAGE_GUIDANCE)
    return request


def _check_fields(model: Model, request: Request, others: Collection[str]) -> None:
    for field in CONDITIONED:
        if getattr(request, field) is not None and field not in (*model.fields, *others):
            raise RequestError(f"{model.spec.id} reads no {field}", needed="a request without one")
    if request.cache_interval > 1 and not model.predictor.caches:
        raise RequestError(
            f"cache_interval is {request.cache_interval}, and the bundle of {model.spec.id} has no shallow graph",
            needed="1",
            fix="export the checkpoint again",
        )


def _guidance(model: Model, request: Request) -> float:
    if model.text is None:
        if request.guidance is not None and request.guidance > 1:
            found = f"guidance is {request.guidance:g}, and {model.spec.id} reads no prompt"
            raise RequestError(found, needed="guidance 1 or none")
        return 1.0
    return model.spec.defaults.guidance if request.guidance is None else request.guidance


def _check_text(model: Model, request: Request) -> None:
    """Refuse what asks too much of the text encoders, or of a model without any."""
    special = {"prompt_syntax": request.prompt_syntax != "plain", "embeddings": bool(request.embeddings)}
    if model.text is None and any(special.values()):
        name = next(name for name, is_set in special.items() if is_set)
        raise RequestError(f"{model.spec.id} reads no {name}", needed="a request without one")
    if model.text is not None and request.prompt is not None and (any(special.values()) or request.clip_skip):
        model.text.check(request)
