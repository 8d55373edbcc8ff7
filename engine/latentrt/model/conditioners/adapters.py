"""LoRAs of each request in a model: which a request asks for, and the inputs of the denoiser that they fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from latentrt.adapters.library import Given as Files
from latentrt.adapters.library import Library
from latentrt.adapters.mixed import RANK, Asked, Mixed
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP16, LORA
from latentrt.errors import AdapterError, BackendError, PlanError, RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Inputs, Sides
from latentrt.model.prompts.extra_networks import loras_in, without_loras
from latentrt.request import Request
from latentrt.runtime.base import Backend
from latentrt.runtime.lazy import LazyNetwork
from latentrt.runtime.tensorrt.record import Profile
from latentrt.sampling.noise import NoiseSource

MOST_RANK = 1024
TAKE = "latentrt export BUNDLE TARGET --adapters"
LOAD = "load them: adapters=FOLDER, --lora-dir FOLDER"


class Adapted(Conditioner):
    """Fills the inputs of LoRAs (`adapters.mixed`), of the denoiser and of what is hoisted out of it.

    Args:
        mixed: the model's LoRAs.
        networks: names of the networks that read them.
    """

    inputs = (LORA,)

    def __init__(self, mixed: Mixed, networks: tuple[str, ...]) -> None:
        self._mixed, self._networks = mixed, networks

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`. All lanes have the same LoRAs."""
        asked = asked_by(request, self._mixed)
        made: Inputs = {}
        for name in self._networks:
            made = {**made, **self._mixed.inputs(name, asked)}
        return Sides.same(made)


class Adapters(NamedTuple):
    """LoRAs that requests may have, and the largest rank of those of one picture together."""

    library: Library
    rank: int = RANK

    @classmethod
    def of(cls, given: Files | None, rank: int = RANK) -> Adapters | None:
        """Return those of files by name or of a folder; None without. Raise AdapterError where they are not there."""
        if given is None:
            return None
        if not 1 <= rank <= MOST_RANK:
            raise AdapterError(f"adapter_rank is {rank}", needed=f"a whole number from 1 to {MOST_RANK}")
        return cls(Library(given), rank)


def with_adapters(bundle: Bundle, adapters: Adapters | None, backend: Backend) -> tuple[Bundle, Mixed | None]:
    """Return a model's bundle with the networks that take LoRAs in the places of its own, and the LoRAs.

    Without LoRAs it is the bundle itself, and None.

    Raises:
        BackendError: the backend runs no such networks.
        AdapterError: the bundle has none, or none for the backend.
    """
    if adapters is None:
        return bundle, None
    if not backend.facts.adapts:
        found = f"LoRAs of each request with {backend.name} on {backend.device}, in {backend.precision}"
        fix = "merge them when exporting, or take backend='onnxruntime'"
        raise BackendError(found, needed="onnxruntime or tensorrt, in fp32 or fp16", fix=fix)
    before, bundle = bundle.spec, adapted(bundle)
    for name, network in bundle.spec.networks.items():
        if network != before.networks[name] and not set(backend.variants) & set(network.variants):
            found = f"the {name} of {before.id} takes LoRAs of each request in {', '.join(network.variants)}"
            raise AdapterError(found, needed=" or ".join(backend.variants), fix=TAKE)
    return bundle, Mixed(adapters.library, bundle, rank=adapters.rank, half=backend.precision == FP16)


def check_ranks(networks: Iterable[LazyNetwork], rank: int) -> None:
    """Refuse networks whose plans take LoRAs of other ranks than an engine's. Raise PlanError."""
    for network in networks:
        profiles: Sequence[Profile] = getattr(network.open(), "profiles", ()) if network.loaded else ()
        ranks = [profile.ranges["rank"] for profile in profiles if "rank" in profile.ranges]
        if ranks and not any(low <= rank <= high for low, _, high in ranks):
            own = ", ".join(dict.fromkeys(str(low) if low == high else f"{low} to {high}" for low, _, high in ranks))
            raise PlanError(
                f"the plans of {network.graph.path} take LoRAs of rank {own}",
                needed=f"{rank}, the engine's adapter_rank",
                fix=f"latentrt build BUNDLE --lora-rank {rank}; or take adapter_rank={ranks[0][2]} (--lora-rank)",
            )


def adapted(bundle: Bundle) -> Bundle:
    """Return a model's bundle with the networks that take LoRAs in the places of its own.

    Raises:
        AdapterError: it has none.
    """
    spec = bundle.spec
    networks = {name: network.adapted() for name, network in spec.networks.items()}
    if networks == spec.networks:
        found = f"the networks of {spec.id} take no LoRAs of each request"
        raise AdapterError(found, needed="a bundle that does", fix=TAKE)
    return replace(bundle, spec=replace(spec, networks=networks))


def asked_by(request: Request, mixed: Mixed | None) -> tuple[Asked, ...]:
    """Return the LoRAs of a request: its own, then those in its prompt. Raise as `strengths_of` and `Mixed.asked`."""
    strengths = strengths_of(request)
    if mixed is None:
        if strengths:
            found = f"there is a LoRA {next(iter(strengths))!r}, and the engine was loaded without any"
            raise AdapterError(found, needed="an engine that has it", fix=LOAD)
        return ()
    return mixed.asked(strengths)


def strengths_of(request: Request) -> Mapping[str, tuple[float, float]]:
    """Return the strengths (UNet, text encoders) of a request's LoRAs by name.

    Raises:
        RequestError: a tag has another form; one stands in the negative prompt; a name stands twice.
    """
    if request.prompt_syntax != "a1111":
        return request.lora
    if found := loras_in(request.negative_prompt or ""):
        raise RequestError(f"the negative prompt has the LoRA {next(iter(found))!r}", needed="it in the prompt")
    tagged = loras_in(request.prompt or "")
    if twice := set(tagged) & set(request.lora):
        raise RequestError(f"the LoRA {min(twice)!r} is in the prompt and in lora", needed="it in one of them")
    return {**request.lora, **tagged}


def lora_facts(request: Request, mixed: Mixed | None) -> dict[str, Any]:
    """Return what a request's pictures carry of its LoRAs; see `Mixed.facts`."""
    return {} if mixed is None else mixed.facts(asked_by(request, mixed))


def without_adapters(request: Request) -> Request:
    """Return the request without its LoRAs, for another model."""
    if request.prompt is not None and request.prompt_syntax == "a1111":
        request = replace(request, prompt=without_loras(request.prompt))
    return replace(request, lora={})


def check_adapters(request: Request, mixed: Mixed | None) -> None:
    """Refuse LoRAs that are not there, or with step caching. Raise RequestError."""
    if asked_by(request, mixed) and request.cache_interval > 1:
        found = f"cache_interval is {request.cache_interval} and there is a LoRA"
        raise RequestError(found, needed="one of them: shallow rows take no LoRAs", fix="leave cache_interval out")
