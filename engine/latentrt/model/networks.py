"""The networks of a model with their names, shapes and dtypes: text encoders, UNet, VAE.

A conditioning is a dict of one lane's UNet inputs, without the batch dimension: "encoder_hidden_states" (77, dim) and,
for SDXL, "text_embeds" (dim,) and "time_ids" (6,); all float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import LatentSpec
from latentrt.errors import NetworkError, PromptTruncatedWarning
from latentrt.model.tokenizer import Tokenizer
from latentrt.runtime.base import Arrays, Network

Float32 = NDArray[np.float32]
Conditioning = Mapping[str, Float32]
CACHED_PROMPTS = 64


def call(network: Network, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Call a network whose graph may be half: floats are fed in its dtypes, and come back as float32."""
    dtypes = {tensor.name: tensor.dtype for tensor in network.graph.inputs}
    outputs = network({name: array.astype(dtypes.get(name), copy=False) for name, array in feeds.items()})
    return {name: array.astype(np.float32, copy=False) for name, array in outputs.items()}


class TextEncoder:
    """Prompts to conditionings, through every (tokenizer, network) pair of the model in order.

    Prompts are remembered. On a CPU a text's states do not depend on its company; on a GPU encode one at a time.
    """

    def __init__(self, pairs: Sequence[tuple[Tokenizer, Network]]) -> None:
        self._pairs = tuple(pairs)
        self._known: dict[str, dict[str, Float32]] = {}  # those that were wanted longest ago first
        self._lock = Lock()

    def encode(self, prompt: str) -> dict[str, Float32]:
        """The conditioning of a prompt; SDXL's time_ids are not in it.

        A prompt longer than the model reads is cut, and a PromptTruncatedWarning says what was dropped.

        Raises:
            RequestError: the prompt is not text that can be encoded in UTF-8.
        """
        return self.encode_all([prompt])[0]

    def encode_all(self, prompts: Sequence[str]) -> list[dict[str, Float32]]:
        """The conditionings of prompts, as in `encode`: those that are not known in one call of each network."""
        ids = {prompt: self.ids(prompt) for prompt in prompts}
        with self._lock:
            found = {prompt: self._known[prompt] for prompt in ids if prompt in self._known}
        new = [prompt for prompt in ids if prompt not in found]
        if new:
            found |= zip(new, self._encode([ids[prompt] for prompt in new]), strict=True)
        with self._lock:
            for prompt in ids:
                self._known.pop(prompt, None)
                self._known[prompt] = found[prompt]
            for old in list(self._known)[:-CACHED_PROMPTS]:
                del self._known[old]
        return [dict(found[prompt]) for prompt in prompts]

    def ids(self, prompt: str) -> tuple[NDArray[np.int64], ...]:
        """A prompt's token ids (tokens,) for each encoder; cut, and warned of, as in `encode`."""
        encoded = [tokenizer.encode(prompt) for tokenizer, _ in self._pairs]
        dropped = max((each.dropped for each in encoded), key=len)
        if dropped:
            warnings.warn(
                f"the prompt is too long for the model; it does not read: {dropped!r}",
                PromptTruncatedWarning,
                3,
            )
        return tuple(each.ids for each in encoded)

    def dropped(self, prompt: str) -> str:
        """The end of a prompt that the model does not read; empty where it reads all."""
        return max((tokenizer.encode(prompt).dropped for tokenizer, _ in self._pairs), key=len)

    def _encode(self, ids: Sequence[tuple[NDArray[np.int64], ...]]) -> list[dict[str, Float32]]:
        """Conditionings of prompts by their token ids for each encoder."""
        states, conditionings = [], [dict[str, Float32]() for _ in ids]
        for (_, network), own in zip(self._pairs, zip(*ids, strict=True), strict=True):
            outputs = call(network, {"input_ids": np.stack(own)})
            states.append(outputs["text_states"])
            for conditioning, embeds in zip(conditionings, outputs.get("text_embeds", ()), strict=False):
                conditioning["text_embeds"] = embeds
        for conditioning, joined in zip(conditionings, np.concatenate(states, axis=-1), strict=True):
            conditioning["encoder_hidden_states"] = joined
        return conditionings


class UNet:
    """The denoising network: one evaluation for a batch of lanes."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def __call__(self, sample: Float32, timestep: Float32, conditioning: Conditioning) -> Float32:
        """Predict.

        Args:
            sample: (lanes, channels, height, width), already scaled by c_in.
            timestep: (lanes,), in training timesteps, fractions allowed.
            conditioning: the inputs of `Conditioning`, each with a leading lane dimension.

        Returns:
            The network's output, shape of `sample`.
        """
        return call(self._network, {"sample": sample, "timestep": timestep, **conditioning})["out"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """What the VAE makes of a picture: the mean and standard deviation of its latents, (channels, height, width)."""

    mean: Float32
    std: Float32

    def draw(self, noise: Float32) -> Float32:
        """One of the latents that the picture may have, by standard normal noise of their shape."""
        return self.mean + self.std * noise


class VAE:
    """Latents to pixels and back; scale and shift are applied here."""

    def __init__(self, decoder: Network, encoder: Network, latents: LatentSpec) -> None:
        self._decoder, self._encoder = decoder, encoder
        self._spec = latents

    def encode(self, image: Float32) -> Encoded:
        """The latents of one picture (3, height, width) in -1..1, sides multiples of the factor.

        Raises:
            NetworkError: the encoder returns numbers that are not finite.
        """
        moments: Float32 = call(self._encoder, {"image": image[None]})["moments"][0]
        if not np.isfinite(moments).all():
            raise NetworkError(
                "the VAE encoder's numbers are not finite", needed="finite numbers", fix="take --precision fp32"
            )
        mean, log_variance = np.split(moments, 2)
        std: Float32 = np.exp(log_variance.clip(-30, 20) / 2)  # diffusers' DiagonalGaussianDistribution
        scale, shift = np.float32(self._spec.scale), np.float32(self._spec.shift)
        return Encoded((mean - shift) * scale, std * scale)

    def decode(self, latents: Float32) -> Float32:
        """(count, channels, height, width) latents to (count, 3, factor * height, factor * width) in about -1..1."""
        return call(self._decoder, {"latents": latents / self._spec.scale + self._spec.shift})["image"]
