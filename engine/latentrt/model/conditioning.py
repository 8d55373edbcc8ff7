"""What the UNet is told besides latents and timestep: texts, and for SDXL sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.manifest import ModelSpec
from latentrt.model.networks import Conditioning, TextEncoder
from latentrt.request import Request

Float32 = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Text:
    """What a picture's text encoders read: ids (tokens,) for each. `uncond` None: the states are zeros instead."""

    cond: tuple[Ids, ...]
    uncond: tuple[Ids, ...] | None
    time_ids: NDArray[np.float32] | None = None


class Conditioner:
    """Requests to conditionings, or to the texts that become them on a device."""

    def __init__(self, spec: ModelSpec, text_encoder: TextEncoder) -> None:
        self._spec, self._text_encoder = spec, text_encoder

    def encode(self, request: Request) -> tuple[Conditioning, Conditioning]:
        """The conditionings (cond, uncond) of a request; without guidance they are the same."""
        cond = self._text_encoder.encode(request.prompt)
        uncond = cond
        if request.guidance > 1:
            uncond = self._text_encoder.encode(request.negative_prompt or "")
            if self._zeros(request):
                uncond = {name: np.zeros_like(array) for name, array in uncond.items()}
        sizes = self._sizes(request)
        return {**cond, **sizes}, {**uncond, **sizes}

    def text(self, request: Request) -> Text:
        """The same before it is encoded."""
        cond = uncond = self._text_encoder.ids(request.prompt)
        if request.guidance > 1:
            uncond = self._text_encoder.ids(request.negative_prompt or "")
        return Text(cond, None if self._zeros(request) else uncond, self._sizes(request).get("time_ids"))

    def _zeros(self, request: Request) -> bool:
        """Whether the model was trained with zeros for no negative prompt."""
        return request.negative_prompt is None and self._spec.zero_negative

    def _sizes(self, request: Request) -> Mapping[str, Float32]:
        """SDXL's time_ids: original size, crop corner, target size, in pixels."""
        if self._spec.family != "sdxl":
            return {}
        height, width = self._spec.latents.pixels_of(request.height, request.width)
        return {"time_ids": np.array([height, width, 0, 0, height, width], np.float32)}
