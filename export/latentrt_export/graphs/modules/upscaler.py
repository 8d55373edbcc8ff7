"""The latent upscaler's networks: a UNet of k-diffusion's blocks, and a text encoder that also gives what it pools.

The UNet becomes a denoiser as others are: from scaled latents to clean latents. What its pipeline computes around it is
part of the graph: the preconditioning (Karras et al. 2022, table 1), and the constant part of its condition.
Source: diffusers' StableDiffusionLatentUpscalePipeline.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.downsampling import KDownsample2D
from diffusers.models.upsampling import KUpsample2D
from torch import Tensor, nn
from torch.nn import functional

from latentrt_export.checkpoint.served import NOISE_LEVELS


class PooledTextEncoder(nn.Module):
    """CLIP's text model: states before the final layer norm, and the pooled one after it.

    `skips` are the layers that may be left out at the end (clip skip).
    """

    def __init__(self, model: Any, skips: int) -> None:
        super().__init__()
        self.model, self._skips = model, skips

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map input_ids (batch, tokens) int64 to text_states (batch, tokens, dim), text_embeds (batch, dim), skipped.

        skipped, (batch, skips, tokens, dim), has at k - 1 the states without the last k layers.
        """
        out = self.model(input_ids, output_hidden_states=True)
        layers = self.model.config.num_hidden_layers  # the first hidden state is that of the embedding
        skipped = [out.hidden_states[layers - skip] for skip in range(1, self._skips + 1)]
        return out.hidden_states[layers], out.pooler_output, torch.stack(skipped, dim=1)


class LatentUpscaler(nn.Module):
    """UNet2DConditionModel that reads twice the latents; its last output, a variance, is left out.

    Its condition is a noise level, of which the pipeline gives none (half of the numbers ones, half zeros), and pooled
    text.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        for module in model.modules():  # theirs fill a weight of the channels' square, almost all zeros, at each call
            if isinstance(module, KDownsample2D):
                module.forward = partial(_halved, module.kernel)
            elif isinstance(module, KUpsample2D):
                module.forward = partial(_doubled, module.kernel)
        self.model = model

    def forward(
        self, sample: Tensor, sigma: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, low_latents: Tensor
    ) -> Tensor:
        """Map sample and low_latents (batch, channels, height, width) to the clean latents of the same shape.

        sample is latents of the noise sigma (batch,), divided by their deviation, sqrt(sigma² + 1).
        """
        half = (NOISE_LEVELS // 2, 0)
        condition = functional.pad(functional.pad(text_embeds, half), half, value=1.0)
        shown = torch.cat([sample, low_latents], dim=1)
        out = self.model(shown, sigma.log() * 0.25, encoder_hidden_states, timestep_cond=condition).sample[:, :-1]
        skip = (sigma**2 + 1) ** -0.5
        clean: Tensor = _by_lane(skip) * sample + _by_lane(sigma * skip) * out
        return clean


def _by_lane(numbers: Tensor) -> Tensor:
    return numbers[:, None, None, None]


def _halved(kernel: Tensor, inputs: Tensor) -> Tensor:
    channels, padded = inputs.shape[1], functional.pad(inputs, (1,) * 4, "reflect")
    return functional.conv2d(padded, kernel.expand(channels, 1, *kernel.shape), stride=2, groups=channels)


def _doubled(kernel: Tensor, inputs: Tensor) -> Tensor:
    channels, padded = inputs.shape[1], functional.pad(inputs, (1,) * 4, "reflect")
    weight = kernel.expand(channels, 1, *kernel.shape)
    return functional.conv_transpose2d(padded, weight, stride=2, padding=3, groups=channels)
