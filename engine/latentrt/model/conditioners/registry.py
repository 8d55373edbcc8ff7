"""The conditioners of a model: chosen by the denoiser's signature, never by a family's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from latentrt.adapters.mixed import Mixed
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import (
    ADAPTER,
    CONDITIONER,
    IMAGE_KEYS,
    IMAGE_VALUES,
    LORA,
    RESIDUAL,
    TEXT_ENCODER,
    TensorSpec,
)
from latentrt.errors import EXPORT, BundleError
from latentrt.model.conditioners.adapters import Adapted
from latentrt.model.conditioners.beside import Edited, Repainted
from latentrt.model.conditioners.class_label import ClassLabel
from latentrt.model.conditioners.depth_map import DepthMap
from latentrt.model.conditioners.guidance_embedding import GuidanceEmbedding
from latentrt.model.conditioners.ip_adapter import ImagePrompts, IpAdapter
from latentrt.model.conditioners.low_latents import LowLatents, Sigma
from latentrt.model.conditioners.low_picture import LowPicture
from latentrt.model.conditioners.sizes import ScoredSizes, Sizes
from latentrt.model.inputs import Conditioner
from latentrt.model.predictor import OWN
from latentrt.model.prompts.encoder import Encoder
from latentrt.model.prompts.tokenizer import Tokenizer
from latentrt.model.text import Text
from latentrt.model.vae.codec import Codec
from latentrt.runtime.base import Network
from latentrt.sampling.schedule import Schedule

MANY = (LORA, IMAGE_KEYS, IMAGE_VALUES)  # begin names of inputs that one conditioner fills


class Parts(NamedTuple):
    """The parts of conditioners: the bundle, its networks by name, the codec, the inputs that they fill, what requests
    may have beside it: LoRAs, IP-Adapters.
    """

    bundle: Bundle
    networks: Mapping[str, Network]
    codec: Codec
    inputs: Mapping[str, TensorSpec]
    adapters: Mixed | None = None
    ip_adapters: tuple[IpAdapter, ...] = ()


def conditioners_of(parts: Parts) -> tuple[Conditioner, ...]:
    """Return the conditioners that fill the inputs except "sample" and "timestep".

    Raises:
        BundleError: no conditioner fills one of them.
    """
    made: dict[Callable[[Parts], Conditioner], Conditioner] = {}
    for name in parts.inputs:
        if name in OWN or name.startswith((RESIDUAL, ADAPTER)):  # of rows, and of add-ons
            continue
        kind = next((prefix for prefix in MANY if name.startswith(prefix)), name)
        if kind not in MAKERS:
            raise _unknown(parts, f"has the input {name!r}", f"inputs among {', '.join((*OWN, *MAKERS))}")
        if MAKERS[kind] not in made:
            made[MAKERS[kind]] = MAKERS[kind](parts)
    return tuple(made.values())


def _text(parts: Parts) -> Conditioner:
    spec = parts.bundle.spec
    encoders = [
        Encoder(name, Tokenizer.open(parts.bundle.path(str(spec.networks[name].tokenizer))), parts.networks[name])
        for name in spec.named(TEXT_ENCODER)
    ]
    if not encoders:
        raise BundleError(f"{spec.id} has no text encoder", needed="one: its denoiser reads texts")
    tokens, guided = parts.inputs["encoder_hidden_states"].shape[1], "timestep_cond" not in parts.inputs
    most = tokens if isinstance(tokens, int) else None
    return Text(encoders, zero_negative=spec.zero_negative, most=most, guided=guided, adapters=parts.adapters)


def _sizes(parts: Parts) -> Conditioner:
    count, kinds = parts.inputs["time_ids"].shape[1], {len(kind.NUMBERS): kind for kind in (Sizes, ScoredSizes)}
    if count not in kinds:
        raise _unknown(parts, f"reads {count} sizes", f"{' or '.join(map(str, kinds))}: {', '.join(Sizes.NUMBERS)}")
    return kinds[count](parts.bundle.spec.latents)


def _guidance_embedding(parts: Parts) -> Conditioner:
    dim = parts.inputs["timestep_cond"].shape[1]
    if not isinstance(dim, int) or dim < 4:
        raise _unknown(parts, f"reads a guidance embedding of {dim} numbers", "4 or more")
    return GuidanceEmbedding(dim)


def _class_label(parts: Parts) -> Conditioner:
    return ClassLabel(parts.inputs["class_labels"].dtype, parts.bundle.spec.classes)


def _beside(parts: Parts) -> Conditioner:
    channels, own = parts.inputs["beside"].shape[1], parts.bundle.spec.latents.channels
    if channels == own:
        return Edited(parts.bundle.spec.latents, scaled=parts.bundle.spec.scaled_picture)
    if channels != 1 + own:
        needed = f"{own}, a picture's; or {1 + own}, with a mask"
        raise _unknown(parts, f"reads {channels} channels beside the latents", needed)
    return Repainted(parts.codec)


def _depth_map(parts: Parts) -> Conditioner:
    return DepthMap()


def _low_picture(parts: Parts) -> Conditioner:
    spec = parts.bundle.spec
    if spec.low_schedule is None or spec.max_noise_level is None:
        needed = "low_schedule and max_noise_level in its manifest"
        raise BundleError(f"the denoiser of {spec.id} reads a noisy picture", needed=needed, fix=EXPORT)
    schedule = Schedule.from_config(parts.bundle.json(spec.low_schedule))
    return LowPicture(spec.latents.factor, schedule, spec.max_noise_level, parts.inputs["noise_level"].dtype)


def _low_latents(parts: Parts) -> Conditioner:
    return LowLatents()


def _sigma(parts: Parts) -> Conditioner:
    return Sigma()


def _adapted(parts: Parts) -> Conditioner:
    if parts.adapters is None:
        raise _unknown(parts, "takes LoRAs of each request", "an engine that was loaded with some")
    spec = parts.bundle.spec
    return Adapted(parts.adapters, (*spec.named(CONDITIONER), spec.denoiser))


def _image_prompts(parts: Parts) -> Conditioner:
    return ImagePrompts(parts.ip_adapters, parts.inputs)


def _unknown(parts: Parts, found: str, needed: str) -> BundleError:
    return BundleError(f"the denoiser of {parts.bundle.spec.id} {found}", needed=needed, fix="update latentrt")


MAKERS: Mapping[str, Callable[[Parts], Conditioner]] = {
    "encoder_hidden_states": _text,
    "text_embeds": _text,
    "time_ids": _sizes,
    "timestep_cond": _guidance_embedding,
    "class_labels": _class_label,
    "beside": _beside,
    "depth_map": _depth_map,
    "low_picture": _low_picture,
    "noise_level": _low_picture,
    "low_latents": _low_latents,
    "sigma": _sigma,
    LORA: _adapted,
    IMAGE_KEYS: _image_prompts,
    IMAGE_VALUES: _image_prompts,
}
