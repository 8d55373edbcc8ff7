"""IP-Adapters: pictures that a UNet's cross attentions look at beside the text.

Each is a bundle of its own, loaded beside a model: an image encoder, and a network that makes keys and values of what
it gives for every cross attention. Both are called once a picture; the denoiser's variant "+ip_adapter" reads these.
Source: Ye, Zhang, Liu, Han, Yang 2023, https://arxiv.org/abs/2308.06721; lanes and scales are diffusers'.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.kept import Kept
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import (
    CONDITIONER,
    HINT,
    IMAGE_KEYS,
    IMAGE_VALUES,
    IP_ADAPTER,
    PROMPTED,
    ModelSpec,
    TensorSpec,
)
from latentrt.bundle.tensors import open_tensors
from latentrt.errors import EXPORT, BackendError, BundleError, RequestError
from latentrt.images.clip import clip_pixels
from latentrt.model.conditioners.block_scales import PLACE, scales_of
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Inputs, Sides
from latentrt.model.networks import AddOn
from latentrt.request import Request
from latentrt.runtime.base import Backend, call
from latentrt.sampling.noise import NoiseSource

Float32 = NDArray[np.float32]
NO_IP_ADAPTERS: Mapping[str, Bundle] = {}
IMAGE_EMBEDS, IMAGE_STATES = "image_embeds", "image_states"  # what image encoders give, one of both
KEYS_WEIGHT = ".to_k_ip.weight"  # ends the names of weights: (channels, the width of the model's texts)
KEYS, VALUES = "keys.", "values."  # begin the names of what an add-on gives: keys.0, values.0, ...
KEPT = 4  # pictures of each add-on
MOST_TOKENS = 4096  # to which those of several are brought


class Seen(NamedTuple):
    """Keys and values of one picture, and of none, for the lane without the prompt; the picture's digest."""

    cond: Inputs
    uncond: Inputs
    digest: str


class IpAdapter(AddOn):
    """An IP-Adapter's networks on a backend. Any thread may call it.

    Args:
        name: that requests have for it.
        bundle: its own.
        backend: runs the networks.
    """

    def __init__(self, name: str, bundle: Bundle, backend: Backend) -> None:
        super().__init__(name, bundle, backend)
        (encoder,), (body,) = self.spec.named(HINT), self.spec.named(CONDITIONER)
        self._encoder, self._body = self.networks[encoder], self.networks[body]
        (self._reads,), (gives,) = self.spec.networks[encoder].inputs, self.spec.networks[encoder].outputs
        self._gives = gives.name
        self._seen = Kept[str, Seen](KEPT)

    @property
    def tokens(self) -> int:
        """How many it makes of a picture."""
        return int(self.spec.networks[self.spec.named(CONDITIONER)[0]].outputs[0].shape[1])

    def prepared(self, image: Any) -> Float32:
        """Return a picture as the image encoder reads it; one that is so already as it is. Raise as `clip_pixels`."""
        side = int(self._reads.shape[2])
        ready = isinstance(image, np.ndarray) and image.dtype == np.float32 and image.shape == (3, side, side)
        return image if ready else clip_pixels(image, side)

    def see(self, image: Any) -> Seen:
        """Return keys and values of a picture. Raise RequestError where it cannot be used."""
        pixels = self.prepared(image)
        digest = f"sha256:{hashlib.sha256(pixels.tobytes()).hexdigest()}"
        return self._seen(digest, lambda: self._looked(pixels, digest))

    def _looked(self, pixels: Float32, digest: str) -> Seen:
        states = self._encode(pixels)
        # Without a picture: an embedding of zeros, or the states of a picture that is zeros.
        none = np.zeros_like(states) if self._gives == IMAGE_EMBEDS else self._encode(np.zeros_like(pixels))
        return Seen(self._keys(states), self._keys(none), digest)

    def _encode(self, pixels: Float32) -> Float32:
        return call(self._encoder, {self._reads.name: pixels[None]})[self._gives]

    def _keys(self, states: Float32) -> Inputs:
        return {name: array[0] for name, array in call(self._body, {self._gives: states}).items()}


class ImagePrompts(Conditioner):
    """Fills the keys and values of pictures, of all IP-Adapters that an engine has.

    Each has a place along the axis of adapters, where those of a request that does not use it are zeros: so jobs with
    different ones, several or none share calls. Tokens are repeated until all have as many: a softmax over a token
    twice gives what it gives over it once.

    Args:
        adapters: the engine's.
        read: the denoiser's inputs.
    """

    inputs = (IMAGE_KEYS, IMAGE_VALUES)

    def __init__(self, adapters: Sequence[IpAdapter], read: Mapping[str, TensorSpec]) -> None:
        self.adapters = tuple(adapters)
        self._places = places_of(read)
        self._tokens = math.lcm(*(one.tokens for one in adapters))
        shape = len(adapters), self._tokens
        self._none = {
            f"{kind}{place}": np.zeros((*shape, channels), np.float32)
            for place, channels in self._places.items()
            for kind in self.inputs
        }
        self._sides = Kept[Hashable, Sides](KEPT)  # pictures of one request share them

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`."""
        asked = {number: one for number, one in enumerate(self.adapters) if one.name in request.ip_adapter}
        if not asked:
            return Sides.same(self._none)
        own = [(number, one.see(request.ip_adapter[one.name].image)) for number, one in asked.items()]
        scales = [scales_of(request.ip_adapter[one.name].scale, tuple(self._places)) for one in asked.values()]
        key = tuple((number, seen.digest, scale) for (number, seen), scale in zip(own, scales, strict=True))
        return self._sides(key, lambda: self._filled(own, scales))

    def _filled(self, own: Sequence[tuple[int, Seen]], scales: Sequence[Sequence[float]]) -> Sides:
        """Return the sides with what adapters, by their numbers, see, at each place by its scale."""
        sides = [{name: zeros.copy() for name, zeros in self._none.items()} for _ in range(2)]
        for (number, seen), each in zip(own, scales, strict=True):
            repeated = self._tokens // self.adapters[number].tokens
            for side, made in zip(sides, (seen.uncond, seen.cond), strict=True):
                for layer, (place, scale) in enumerate(zip(self._places, each, strict=True)):
                    values = made[f"{VALUES}{layer}"] * np.float32(scale)
                    side[f"{IMAGE_KEYS}{place}"][number] = np.tile(made[f"{KEYS}{layer}"], (repeated, 1))
                    side[f"{IMAGE_VALUES}{place}"][number] = np.tile(values, (repeated, 1))
        return Sides(*sides)

    def check_settings(self, request: Request) -> None:
        """See `Conditioner`."""
        for own in request.ip_adapter.values():
            scales_of(own.scale, tuple(self._places))


def places_of(read: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Return the channels of each cross attention that looks at pictures, by its place, in the order of the inputs."""
    return {
        name.removeprefix(IMAGE_KEYS): int(tensor.shape[3])
        for name, tensor in read.items()
        if name.startswith(IMAGE_KEYS)
    }


def prompted(bundle: Bundle, backend: Backend, adapters: Mapping[str, Bundle]) -> Bundle:
    """Return a model's bundle with the denoiser that looks at pictures in the place of its own, if there are adapters.

    Raises:
        BackendError: the backend runs no such denoiser.
        BundleError: as of `looking`.
    """
    if not adapters:
        return bundle
    if backend.gpu is not None:
        found = f"IP-Adapters ({', '.join(adapters)}) with {backend.name} on {backend.device}"
        needed = "a CPU: there are no graphs for a GPU yet"
        raise BackendError(found, needed=needed, fix="take device='cpu' (--device cpu)")
    return looking(bundle)


def looking(bundle: Bundle) -> Bundle:
    """Return a model's bundle with the denoiser that looks at pictures in the place of its own.

    Raises:
        BundleError: it has none.
    """
    spec = bundle.spec
    network = spec.networks[spec.denoiser].adapted(PROMPTED)
    if network is spec.networks[spec.denoiser]:
        needed = "a bundle of a UNet with text, exported from a checkpoint by this version"
        raise BundleError(f"the denoiser of {spec.id} looks at no pictures", needed=needed, fix=EXPORT)
    for tensor in network.inputs:
        if tensor.name.startswith((IMAGE_KEYS, IMAGE_VALUES)):
            place, whole = tensor.name.partition(".")[2], [isinstance(side, int) for side in tensor.shape]
            if not PLACE.fullmatch(place) or whole != [False, False, False, True]:
                found = f"the denoiser of {spec.id} has the input {tensor.name} {tensor.shape}"
                raise BundleError(found, needed="a place, and (batch, adapters, image_tokens, channels)", fix=EXPORT)
    return replace(bundle, spec=replace(spec, networks={**spec.networks, spec.denoiser: network}))


def open_ip_adapters(
    bundles: Mapping[str, Bundle], model: ModelSpec, read: Mapping[str, TensorSpec], backend: Backend
) -> tuple[IpAdapter, ...]:
    """Load IP-Adapters beside a model.

    Args:
        bundles: by the names that requests have for them.
        model: with the denoiser of `prompted`.
        read: the denoiser's inputs.
        backend: runs the networks.

    Raises:
        RequestError: a bundle is none, or of one for other models; or their tokens cannot be brought to one number.
        BundleError: an IP-Adapter has other networks than this version makes.
    """
    for name, bundle in bundles.items():
        _check_fits(name, bundle, model, read)
    opened = tuple(IpAdapter(name, bundle, backend) for name, bundle in bundles.items())
    tokens = [one.tokens for one in opened]
    if tokens and math.lcm(*tokens) > MOST_TOKENS:
        found = f"IP-Adapters of {', '.join(map(str, tokens))} tokens together"
        raise RequestError(found, needed="numbers with a small common multiple", fix="load fewer")
    return opened


def check_ip_adapters(request: Request, adapters: Sequence[IpAdapter], model: str) -> None:
    """Refuse a request with an IP-Adapter that is not there, or with step caching. Raise RequestError."""
    known = [one.name for one in adapters]
    if unknown := [name for name in request.ip_adapter if name not in known]:
        raise RequestError(
            f"there is an ip_adapter {unknown[0]!r}, and {model} is loaded with {', '.join(known) or 'none'}",
            needed="an IP-Adapter of that name",
            fix="load it: ip_adapter={'NAME': folder}, --ip-adapter-model NAME=FOLDER",
        )
    if request.ip_adapter and request.cache_interval > 1:
        found = f"cache_interval is {request.cache_interval} and there is an ip_adapter"
        raise RequestError(found, needed="one: shallow rows look at no pictures", fix="leave cache_interval out")


def prepared_prompts(request: Request, adapters: Sequence[IpAdapter]) -> Request:
    """Return a request with its image prompts as image encoders read them, for all its pictures. Raise RequestError."""
    own = request.ip_adapter
    ready = {
        one.name: replace(own[one.name], image=one.prepared(own[one.name].image)) for one in adapters if one.name in own
    }
    return replace(request, ip_adapter=ready) if ready else request


def ip_adapter_facts(request: Request, adapters: Sequence[IpAdapter]) -> dict[str, Any]:
    """Return what a request's pictures carry of their IP-Adapters; {} without."""
    own = {one.name: (one, request.ip_adapter[one.name]) for one in adapters if one.name in request.ip_adapter}
    facts = {name: {"scale": asked.scale, "image": one.see(asked.image).digest} for name, (one, asked) in own.items()}
    return {"ip_adapter": facts} if facts else {}


def _check_fits(name: str, bundle: Bundle, model: ModelSpec, read: Mapping[str, TensorSpec]) -> None:
    own = bundle.spec
    if own.kind != IP_ADAPTER:
        raise RequestError(
            f"{own.id}, loaded as the ip_adapter {name!r}, is none",
            needed="the bundle of an IP-Adapter",
            fix="export one: latentrt export IP-ADAPTER.safetensors BUNDLE",
        )
    _check_networks(own)
    body = own.networks[own.named(CONDITIONER)[0]]
    found = [tensor.shape[-1] for tensor in body.outputs[::2]], _text_width(bundle)
    needed = list(places_of(read).values()), read["encoder_hidden_states"].shape[2]
    if found != needed:
        raise RequestError(
            f"the IP-Adapter {own.id} is for {_told(*found)}",
            needed=f"{_told(*needed)}, as {model.id} has",
            fix="take an IP-Adapter that was trained for this kind of model",
        )


def _text_width(bundle: Bundle) -> int:
    """Return how wide the texts are of the model that an IP-Adapter was trained for; its tokens are as wide.

    No input tells it: the models of Stable Diffusion 1 and 2 differ in nothing else. Raise BundleError.
    """
    files = [name for name in bundle.files if name.endswith(".safetensors")]
    shapes = [open_tensors(bundle.path(name), BundleError).shapes for name in files]
    widths = {shape[-1] for each in shapes for name, shape in each.items() if name.endswith(KEYS_WEIGHT) and shape}
    if len(widths) != 1:
        needed = f"weights {KEYS_WEIGHT} of one width"
        raise BundleError(f"{bundle.spec.id} has no keys of pictures", needed=needed, fix=EXPORT)
    return widths.pop()


def _check_networks(own: ModelSpec) -> None:
    """Refuse an add-on whose networks have other inputs or outputs than `IpAdapter` uses. Raise BundleError."""
    encoder, body = (own.networks[own.named(role)[0]] for role in (HINT, CONDITIONER))
    pictures, made = ([tensor.shape[1:] for tensor in tensors] for tensors in (encoder.inputs, body.outputs))
    gives, reads = ([tensor.name for tensor in tensors] for tensors in (encoder.outputs, body.inputs))
    expected = [f"{kind}{layer}" for layer in range(len(made) // 2) for kind in (KEYS, VALUES)]
    whole = all(isinstance(side, int) and side > 0 for shape in (*pictures, *made) for side in shape)
    good = (
        len(pictures) == 1
        and pictures[0] == (3, *pictures[0][-1:] * 2)
        and gives == reads
        and reads in ([IMAGE_EMBEDS], [IMAGE_STATES])
        and {len(shape) for shape in made} == {2}
        and len({shape[0] for shape in made}) == 1
        and [tensor.name for tensor in body.outputs] == expected
    )
    if not good or not whole:
        raise BundleError(f"{own.id} has other networks than an IP-Adapter", needed="those of this version", fix=EXPORT)


def _told(channels: Sequence[Any], width: Any) -> str:
    count, wide = len(channels), ", ".join(map(str, dict.fromkeys(channels)))
    return f"{count} cross attentions of {wide} channels, with texts of {width}"
