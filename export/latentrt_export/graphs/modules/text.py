"""CLIP's text encoders as torch modules with flat tensor inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection


class TextEncoder(nn.Module):
    """CLIP's text model as StableDiffusionPipeline uses it: states after the final layer norm.

    `skips` are the layers that may be left out at the end (clip skip).
    """

    def __init__(self, model: Any, skips: int) -> None:
        super().__init__()
        self.model, self._skips = model, skips

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Map input_ids (batch, tokens) int64 to text_states (batch, tokens, dim) and skipped.

        skipped, (batch, skips, tokens, dim), has at k - 1 the states without the last k layers.
        """
        out = self.model(input_ids, output_hidden_states=True)
        norm = getattr(self.model, "text_model", self.model).final_layer_norm
        layers = self.model.config.num_hidden_layers  # the first hidden state is that of the embedding
        skipped = [norm(out.hidden_states[layers - skip]) for skip in range(1, self._skips + 1)]
        return out.last_hidden_state, torch.stack(skipped, dim=1)


class PenultimateTextEncoder(nn.Module):
    """CLIP's text model as StableDiffusionXLPipeline uses it: the states before the last layer.

    A model with a projection also gives the projected, pooled text_embeds (batch, dim). `skips` as of `TextEncoder`.
    """

    def __init__(self, model: Any, skips: int) -> None:
        super().__init__()
        self.model, self._skips = model, skips

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        """Map input_ids (batch, tokens) int64 to text_states (batch, tokens, dim), perhaps text_embeds, and skipped."""
        out = self.model(input_ids, output_hidden_states=True)
        layers = self.model.config.num_hidden_layers
        pooled = (out.text_embeds,) if isinstance(self.model, CLIPTextModelWithProjection) else ()
        skipped = [out.hidden_states[layers - 1 - skip] for skip in range(1, self._skips + 1)]
        return out.hidden_states[layers - 1], *pooled, *([torch.stack(skipped, dim=1)] if skipped else ())
