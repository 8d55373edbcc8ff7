"""Texts: prompts through grammars and text encoders to the states that the denoiser attends to."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.kept import Kept
from latentrt.adapters.mixed import Asked, Mixed
from latentrt.errors import EXPORT, PromptSyntaxWarning, PromptTruncatedWarning, RequestError
from latentrt.model.conditioners.adapters import asked_by
from latentrt.model.given import Given
from latentrt.model.inputs import Conditioner, Inputs, Sides
from latentrt.model.prompts.embeddings import read_embedding
from latentrt.model.prompts.encoder import IDS, Encoder, text_input
from latentrt.model.prompts.reading import Reading
from latentrt.model.prompts.registry import GRAMMARS, foreign
from latentrt.request import Request
from latentrt.sampling.noise import NoiseSource

Float32 = NDArray[np.float32]
CACHED_PROMPTS, CACHED_EMBEDDINGS = 64, 4


class Told(NamedTuple):
    """A text as it is asked for.

    Attributes:
        text, syntax: of the prompt.
        skip: layers of the encoders to leave out at the end.
        files: of embeddings: token, path, time of change and size of each.
        lora: the LoRAs that change the encoders.
    """

    text: str
    syntax: str = "plain"
    skip: int = 0
    files: tuple[tuple[str, str, int, int], ...] = ()
    lora: tuple[Asked, ...] = ()


class Unread(NamedTuple):
    """What the model does not read of a request's texts, by the request's fields: ends, and syntax drawn as letters."""

    cut: dict[str, str]
    letters: dict[str, str]


class Text(Conditioner):
    """Fills "encoder_hidden_states" (tokens, dim) and, where an encoder gives it, "text_embeds" (dim,); float32.

    Prompts are cached. Any thread may encode.

    Args:
        encoders: in the order in which their states are concatenated.
        zero_negative: whether zeros stand for no negative prompt.
        most: tokens that the denoiser reads, where their number is fixed.
        guided: whether the model's pictures may have a lane without the prompt, and so a negative prompt.
        adapters: the model's LoRAs of each request.
    """

    inputs = ("encoder_hidden_states", "text_embeds")

    def __init__(
        self,
        encoders: Sequence[Encoder],
        *,
        zero_negative: bool = False,
        most: int | None = None,
        guided: bool = True,
        adapters: Mixed | None = None,
    ) -> None:
        self.encoders, self._adapters = tuple(encoders), adapters
        self.fields = ("prompt", *(["negative_prompt"] if guided else []), "clip_skip")
        self._zero_negative, self._most = zero_negative, most
        self._files: Mapping[str, Path] = {}
        self._taught = Kept[Hashable, tuple[Encoder, ...]](CACHED_EMBEDDINGS)
        self._readings = Kept[Told, tuple[Reading, ...]](CACHED_PROMPTS)
        self._known = Kept[Told, dict[str, Float32]](CACHED_PROMPTS)
        self._warned = False

    def __call__(self, request: Request, given: Given | None, noise: NoiseSource) -> Sides:
        """See `Conditioner`. Without guidance both sides are the prompt's."""
        told = self._told(request)
        cond = self._encode(told["prompt"])
        if "negative_prompt" not in told:
            return Sides.same(cond)
        uncond = self._encode(told["negative_prompt"])
        if self._zeros(request):
            uncond = {name: np.zeros_like(array) for name, array in uncond.items()}
        return Sides(uncond, cond)

    def tokens(self, request: Request) -> Sides:
        """Return token ids (tokens,) by the encoders' names instead, for networks that read them on a device.

        LoRAs of the encoders are among them, by the names of `text_input`. The uncond side is empty where the states
        are zeros. Only for requests that `draws_at_once`.
        """
        told = self._told(request)
        cond = self._by_name(told["prompt"])
        if "negative_prompt" not in told:
            return Sides.same(cond)
        return Sides({} if self._zeros(request) else self._by_name(told["negative_prompt"]), cond)

    def draws_at_once(self, request: Request) -> bool:
        """Return whether the encoders alone make a request's states of ids: no weights, embeddings, skips or chunks."""
        readings = [self._read(told) for told in self._told(request).values()]
        return not request.clip_skip and all(one.plain for each in readings for one in each)

    def learn(self, files: Mapping[str, Path]) -> None:
        """Take embeddings for all later prompts, by their tokens.

        Raises:
            RequestError: a file cannot be read, or does not fit the model.
        """
        self._speaking(self._stamps(files))
        self._files = {**self._files, **files}

    def forget(self) -> None:
        """Encode all prompts anew from now on: the encoders have other weights."""
        self._known.clear()

    def check(self, request: Request) -> None:
        """Refuse what cannot be encoded. Raise RequestError."""
        for told in self._told(request).values():
            readings = self._read(told)
            for encoder, reading in zip(self.encoders, readings, strict=True):
                encoder.check(reading, told.skip)

    def unread(self, request: Request) -> Unread:
        """Return what the model does not read of a request's texts."""
        told = self._told(request)
        cut = {name: _dropped(self._read(one)) for name, one in told.items()}
        letters = {name: str(foreign(one.text, one.syntax) or "") for name, one in told.items()}
        return Unread(*({name: text for name, text in each.items() if text} for each in (cut, letters)))

    def encode(self, prompt: str, syntax: str = "plain", *, skip: int = 0) -> dict[str, Float32]:
        """Return the denoiser's inputs for a prompt.

        A prompt longer than the model reads is cut, and a PromptTruncatedWarning says what was dropped. A
        PromptSyntaxWarning says, once, what other syntax it has.

        Args:
            prompt: the text.
            syntax: a name of `GRAMMARS`.
            skip: layers of the encoders to leave out at the end, as diffusers counts.

        Raises:
            RequestError: the prompt is not text that can be encoded in UTF-8, or it does not fit the syntax or model.
        """
        lora = asked_by(Request(prompt=prompt, prompt_syntax=syntax), self._adapters)
        return self._encode(Told(prompt, syntax, skip, self._stamps({}), lora))

    def _told(self, request: Request) -> dict[str, Told]:
        """Return the texts that a request's pictures need, by the request's fields."""
        if request.prompt is None:
            raise RequestError("there is no prompt", needed="what to draw", fix='pass one: "a red apple"')
        syntax, skip, files = request.prompt_syntax, request.clip_skip or 0, self._stamps(request.embeddings)
        if syntax == "a1111" and not self._skips_in_a1111:
            skip = 0
        lora = tuple(one for one in asked_by(request, self._adapters) if one.text)
        told = {"prompt": Told(request.prompt, syntax, skip, files, lora)}
        if "negative_prompt" in self.fields and request.guidance is not None and request.guidance > 1:
            negative = Told(request.negative_prompt or "", syntax, skip if syntax == "a1111" else 0, files, lora)
            told["negative_prompt"] = negative
        return told

    @property
    def _skips_in_a1111(self) -> bool:
        """Whether the web UI's clip skip has an effect: not on two encoders, nor on OpenCLIP's, which pad otherwise."""
        return len(self.encoders) == 1 and self.encoders[0].tokenizer.pad == self.encoders[0].tokenizer.end

    def _zeros(self, request: Request) -> bool:
        return request.negative_prompt is None and self._zero_negative

    def _stamps(self, files: Mapping[str, str | Path]) -> tuple[tuple[str, str, int, int], ...]:
        """Return the files of all embeddings, those of one request too, as `Told.files`."""
        found = []
        for token, path in {**self._files, **files}.items():
            try:
                facts = Path(path).stat()
            except OSError as error:
                raise RequestError(f"{path} cannot be read ({error.strerror})", needed="an embedding") from error
            found.append((token, str(path), facts.st_mtime_ns, facts.st_size))
        return tuple(found)

    def _speaking(self, files: tuple[tuple[str, str, int, int], ...]) -> tuple[Encoder, ...]:
        """Return the encoders with embeddings."""
        return self._taught(files, lambda: self._teach(files)) if files else self.encoders

    def _teach(self, files: tuple[tuple[str, str, int, int], ...]) -> tuple[Encoder, ...]:
        embeddings = {token: read_embedding(Path(path)) for token, path, *_ in files}
        return tuple(one.with_embeddings(embeddings, len(self.encoders)) for one in self.encoders)

    def _read(self, told: Told) -> tuple[Reading, ...]:
        """Return a text's reading for each encoder."""
        return self._readings(told, lambda: self._fresh_reading(told))

    def _fresh_reading(self, told: Told) -> tuple[Reading, ...]:
        readings = tuple(GRAMMARS[told.syntax](told.text, one.tokenizer) for one in self._speaking(told.files))
        most = max(one.tokens for one in readings)
        if self._most is not None and most > self._most:
            raise RequestError(
                f"the prompt takes {most} tokens, and the denoiser of this bundle reads {self._most}",
                needed="a shorter prompt",
                fix=EXPORT,
            )
        return readings

    def _by_name(self, told: Told) -> Inputs:
        self._warn(told)
        made: dict[str, NDArray[Any]] = {}
        for encoder, reading in zip(self.encoders, self._read(told), strict=True):
            own = {IDS: reading.rows[0].ids, **self._loras(encoder, told)}
            made |= {text_input(encoder.name, name): array for name, array in own.items()}
        return made

    def _loras(self, encoder: Encoder, told: Told) -> Inputs:
        return {} if self._adapters is None else self._adapters.inputs(encoder.name, told.lora)

    def _encode(self, told: Told) -> dict[str, Float32]:
        self._warn(told)
        return self._known(told, lambda: self._fresh(told))

    def _fresh(self, told: Told) -> dict[str, Float32]:
        states, inputs = [], dict[str, Float32]()
        for encoder, reading in zip(self._speaking(told.files), self._read(told), strict=True):
            encoder.check(reading, told.skip)
            own, pooled = encoder(reading, told.skip, self._loras(encoder, told))
            states.append(own)
            if pooled is not None:
                inputs["text_embeds"] = pooled
        return {**inputs, "encoder_hidden_states": np.concatenate(states, axis=-1)}

    def _warn(self, told: Told) -> None:
        """Warn of what is cut, each time, and of other syntax, once."""
        if dropped := _dropped(self._read(told)):
            told_of = f"the prompt is too long for the model; it does not read: {dropped!r}"
            warnings.warn(told_of, PromptTruncatedWarning, 4)
        if not self._warned and (found := foreign(told.text, told.syntax)) is not None:
            self._warned = True
            warnings.warn(str(found), PromptSyntaxWarning, 4)


def _dropped(readings: Sequence[Reading]) -> str:
    """Return the end of a text that some encoder does not read; empty where all read all."""
    return max((one.dropped for one in readings), key=len)
