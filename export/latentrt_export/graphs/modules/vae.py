"""VAEs' halves as torch modules with flat tensor inputs and outputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class VaeDecoder(nn.Module):
    """Unscaled latents (batch, channels, height, width) to an image (batch, 3, 8·height, 8·width) about -1..1."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        image: Tensor = self.model.decode(latents).sample
        return image


class VaeEncoder(nn.Module):
    """An image (batch, 3, height, width) to the moments (batch, 2·channels, ...): mean, then log variance."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        moments: Tensor = self.model.encode(image).latent_dist.parameters
        return moments


class TinyEncoder(nn.Module):
    """An image (batch, 3, height, width) to its unscaled latents (batch, channels, ...), which no noise is added to."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(image).latents
        return latents
