"""UNets as torch modules with flat tensor inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class UNet(nn.Module):
    """UNet2DConditionModel. Channels that it reads beside the latents are an input of their own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        # diffusers gives upsamplers their output size only where a latent size is not divisible by 2**num_upsamplers,
        # and tracing keeps one branch. Nothing is divisible by 2**62: the branch that is right for every size is kept.
        model.num_upsamplers = 62
        self.model = model

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
        beside: Tensor | None = None,
        depth_map: Tensor | None = None,
        low_picture: Tensor | None = None,
        noise_level: Tensor | None = None,
        timestep_cond: Tensor | None = None,
    ) -> Tensor:
        """Map sample (batch, channels, height, width) to out of the same shape."""
        added = None if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        extra = [one for one in (beside, depth_map, low_picture) if one is not None]
        sample = torch.cat([sample, *extra], dim=1) if extra else sample
        out: Tensor = self.model(
            sample,
            timestep,
            encoder_hidden_states,
            class_labels=noise_level,
            timestep_cond=timestep_cond,
            added_cond_kwargs=added,
        ).sample
        return out


class PixelUNet(nn.Module):
    """UNet2DModel: no text; class labels where it was trained with them."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """Map sample (batch, channels, height, width) to out of the same shape."""
        out: Tensor = self.model(sample, timestep, class_labels).sample
        return out
