"""Texts: prompts through tokenizers and text encoders to the states that the denoiser attends to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import PromptTruncatedWarning, RequestError
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Inputs, Sides
from latentrt.model.tokenizer import Tokenizer
from latentrt.request import Request
from latentrt.runtime.base import Network, call
from latentrt.sampling.noise import NoiseSource

Float32 = NDArray[np.float32]
CACHED_PROMPTS = 64


class Encoder(NamedTuple):
    """A text encoder by its name in the manifest, with its tokenizer."""

    name: str
    tokenizer: Tokenizer
    network: Network


class Text(Conditioner):
    """Fills "encoder_hidden_states" (tokens, dim) and, where an encoder gives it, "text_embeds" (dim,); float32.

    Prompts are cached. Any thread may encode.

    Args:
        encoders: in the order in which their states are concatenated.
        zero_negative: whether zeros stand for no negative prompt.
        guided: whether the model's pictures may have a lane without the prompt, and so a negative prompt.
    """

    inputs = ("encoder_hidden_states", "text_embeds")

    def __init__(self, encoders: Sequence[Encoder], *, zero_negative: bool = False, guided: bool = True) -> None:
        self.encoders = tuple(encoders)
        self.fields = ("prompt", "negative_prompt") if guided else ("prompt",)
        self._zero_negative, self._guides = zero_negative, guided
        self._known: dict[str, dict[str, Float32]] = {}  # the least recently used first
        self._lock = Lock()

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`. Without guidance both sides are the prompt's."""
        cond = self.encode(_prompt(request))
        if not self._guided(request):
            return Sides.same(cond)
        uncond = self.encode(request.negative_prompt or "")
        if self._zeros(request):
            uncond = {name: np.zeros_like(array) for name, array in uncond.items()}
        return Sides(uncond, cond)

    def tokens(self, request: Request) -> Sides:
        """Return token ids (tokens,) by the encoders' names instead, for networks that read them on a device.

        The uncond side is empty where the states are zeros.
        """
        cond = self._by_name(_prompt(request))
        if not self._guided(request):
            return Sides.same(cond)
        return Sides({} if self._zeros(request) else self._by_name(request.negative_prompt or ""), cond)

    def texts(self, request: Request) -> Mapping[str, str]:
        """Return the texts that a request's pictures need, by the request's fields."""
        texts = {"prompt": _prompt(request)}
        return {**texts, "negative_prompt": request.negative_prompt or ""} if self._guided(request) else texts

    def dropped(self, text: str) -> str:
        """Return the end of a text that the model does not read; empty where it reads all."""
        return max((encoder.tokenizer.encode(text).dropped for encoder in self.encoders), key=len)

    def encode(self, prompt: str) -> dict[str, Float32]:
        """Return the denoiser's inputs for a prompt.

        A prompt longer than the model reads is cut, and a PromptTruncatedWarning says what was dropped.

        Raises:
            RequestError: the prompt is not text that can be encoded in UTF-8.
        """
        ids = self._ids(prompt)
        with self._lock:
            known = self._known.get(prompt)
        inputs = self._encode(ids) if known is None else known
        with self._lock:
            self._known.pop(prompt, None)
            self._known[prompt] = inputs
            for old in list(self._known)[:-CACHED_PROMPTS]:
                del self._known[old]
        return inputs

    def _guided(self, request: Request) -> bool:
        return self._guides and request.guidance is not None and request.guidance > 1

    def _zeros(self, request: Request) -> bool:
        return request.negative_prompt is None and self._zero_negative

    def _by_name(self, prompt: str) -> Inputs:
        return {encoder.name: ids for encoder, ids in zip(self.encoders, self._ids(prompt), strict=True)}

    def _ids(self, prompt: str) -> tuple[NDArray[np.int64], ...]:
        """Return a prompt's token ids (tokens,) for each encoder; cut, with a warning, as in `encode`."""
        encoded = [encoder.tokenizer.encode(prompt) for encoder in self.encoders]
        dropped = max((each.dropped for each in encoded), key=len)
        if dropped:
            warnings.warn(
                f"the prompt is too long for the model; it does not read: {dropped!r}",
                PromptTruncatedWarning,
                3,
            )
        return tuple(each.ids for each in encoded)

    def _encode(self, ids: Sequence[NDArray[np.int64]]) -> dict[str, Float32]:
        """Return the denoiser's inputs for a prompt, from its token ids for each encoder."""
        states, inputs = [], dict[str, Float32]()
        for encoder, own in zip(self.encoders, ids, strict=True):
            outputs = call(encoder.network, {"input_ids": own[None]})
            states.append(outputs["text_states"][0])
            if "text_embeds" in outputs:
                inputs["text_embeds"] = outputs["text_embeds"][0]
        return {**inputs, "encoder_hidden_states": np.concatenate(states, axis=-1)}


def _prompt(request: Request) -> str:
    if request.prompt is None:
        raise RequestError("there is no prompt", needed="what to draw", fix='pass one: "a red apple"')
    return request.prompt
