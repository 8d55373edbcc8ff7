"""A ControlNet as two torch modules: the hint's embedding, run once a picture, and what every row runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class Hint(nn.Module):
    """The embedding of a hint, in the channel order that people have: RGB."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, picture: Tensor) -> Tensor:
        """Map picture (batch, 3, ...), RGB in 0..1, to hint (batch, channels, height, width) of the latents' size."""
        if self.model.config.controlnet_conditioning_channel_order == "bgr":
            picture = torch.flip(picture, dims=[1])
        hint: Tensor = self.model.controlnet_cond_embedding(picture)
        return hint


class ControlNet(nn.Module):
    """ControlNetModel on a hint that is embedded already, its residuals unscaled."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.controlnet_cond_embedding = nn.Identity()
        # An embedding has no order of channels; residuals are pooled once they are scaled (`parts.control.add_chain`).
        model.register_to_config(controlnet_conditioning_channel_order="rgb", global_pool_conditions=False)
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Map sample (batch, channels, height, width) to the residuals of all skips, and that of the middle."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.model(
            sample, timestep, encoder_hidden_states, hint, added_cond_kwargs=added, return_dict=False
        )
        return (*down, middle)


class ControlNetUnion(nn.Module):
    """ControlNetUnionModel on one hint that is embedded already, its residuals unscaled."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.controlnet_cond_embedding = nn.Identity()
        model.register_to_config(global_pool_conditions=False)
        for layer in model.transformer_layes:
            layer.attention = partial(_attention, layer.attn)
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        hint: Tensor,
        control_type: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Map sample (batch, channels, height, width) to residuals; one number of control_type (batch, types) is 1."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        down, middle = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            [hint],
            control_type,
            [control_type.argmax(dim=1)],
            added_cond_kwargs=added,
            return_dict=False,
        )
        return (*down, middle)


def _attention(layer: nn.MultiheadAttention, x: Tensor) -> Tensor:
    """Return the attention of one picture's lanes: diffusers' attends over the lanes of a call, which are alike there.

    So each gets its own value, and no lane depends on other pictures. x is (batch, parts, channels).
    """
    size = layer.embed_dim
    value = functional.linear(x, layer.in_proj_weight[2 * size :], layer.in_proj_bias[2 * size :])
    attended: Tensor = layer.out_proj(value)
    return attended
