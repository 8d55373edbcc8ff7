"""A T2I-Adapter as a torch module: the features of a picture, computed once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Adapter(nn.Module):
    """T2IAdapter, in operations for which every runtime has kernels, with sizes that a graph can say."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        model.adapter.unshuffle = Unshuffle(model.adapter.unshuffle.downscale_factor)
        for block in model.adapter.body:
            if block.downsample is not None:  # a pool of 2 x 2, rounded up
                block.downsample = Halved()
        self.model = model

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        """Map picture (batch, channels, ...), in 0..1, to features for each block of a UNet, from the first one's."""
        return tuple(self.model(picture))


class Unshuffle(nn.Module):
    """PixelUnshuffle, one side at a time: no reshape has two sizes that only a call knows."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, c, f * height, f * width) to (batch, c * f * f, height, width)."""
        columns = torch.unflatten(x, 3, (-1, self.factor)).permute(0, 1, 3, 4, 2)  # batch, c, width, f, f * height
        parts = torch.unflatten(columns, 4, (-1, self.factor)).permute(0, 4, 2, 1, 5, 3)
        # parts: batch, height, width, c, f, f
        return parts.flatten(3).permute(0, 3, 1, 2)


class Halved(nn.Module):
    """AvgPool2d(2, ceil_mode=True): a window that is cut off is averaged alone."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (batch, channels, height, width) to half of both sides, rounded up."""
        rows = (x[:, :, ::2] + torch.cat([x, x[:, :, -1:]], dim=2)[:, :, 1::2]) / 2
        halved: Tensor = (rows[..., ::2] + torch.cat([rows, rows[..., -1:]], dim=3)[..., 1::2]) / 2
        return halved
