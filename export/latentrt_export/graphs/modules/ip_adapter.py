"""An IP-Adapter as two torch modules: the image encoder, and what makes keys and values of what that gives.

The second one's parameters have the names that published files have for them.
Sources: Ye, Zhang, Liu, Han, Yang 2023, https://arxiv.org/abs/2308.06721; the resampler is that of Alayrac et al. 2022
(Flamingo), https://arxiv.org/abs/2204.14198.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from latentrt_export.checkpoint.add_ons.ip_adapter import BASE, FULL, HEAD, PLUS, IpAdapter, numbers


class ImageEncoder(nn.Module):
    """CLIPVisionModelWithProjection: a picture's embedding or, of `states`, the states before its last layer."""

    def __init__(self, model: Any, *, states: bool) -> None:
        super().__init__()
        self.model, self.states = model, states

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Map pixel_values (batch, 3, size, size), normalised, to (batch, width) or (batch, patches + 1, width)."""
        given = self.model(pixel_values, output_hidden_states=self.states)
        found: Tensor = given.hidden_states[-2] if self.states else given.image_embeds
        return found


class ImagePrompt(nn.Module):
    """Keys and values of a picture's tokens for every cross attention."""

    def __init__(self, own: IpAdapter) -> None:
        super().__init__()
        self.model: Any = _Weights(own)

    def forward(self, image_embeds: Tensor | None = None, image_states: Tensor | None = None) -> tuple[Tensor, ...]:
        """Map what the image encoder gives, one of both, to keys, values, keys, ...: (batch, tokens, channels) each."""
        tokens = self.model.image_proj(image_embeds if image_states is None else image_states)
        return tuple(layer(tokens) for pair in self.model.ip_adapter.values() for layer in pair.values())


class _Weights(nn.Module):
    def __init__(self, own: IpAdapter) -> None:
        super().__init__()
        self.config = own._asdict()
        self.image_proj = {BASE: Projection, PLUS: Resampler, FULL: TwoLayers}[own.kind](own)
        self.ip_adapter = nn.ModuleDict(
            {
                str(number): nn.ModuleDict(
                    {f"to_{kind}_ip": nn.Linear(own.cross, channels, bias=False) for kind in "kv"}
                )
                for number, channels in zip(numbers(len(own.channels)), own.channels, strict=True)
            }
        )


class Projection(nn.Module):
    """Tokens of a picture's embedding."""

    def __init__(self, own: IpAdapter) -> None:
        super().__init__()
        self.proj, self.norm = nn.Linear(own.width, own.tokens * own.cross), nn.LayerNorm(own.cross)
        self.tokens = own.tokens

    def forward(self, embeds: Tensor) -> Tensor:
        """Map (batch, width) to (batch, tokens, cross)."""
        tokens: Tensor = self.norm(torch.unflatten(self.proj(embeds), 1, (self.tokens, -1)))
        return tokens


class TwoLayers(nn.Module):
    """A token of each state of a picture."""

    def __init__(self, own: IpAdapter) -> None:
        super().__init__()
        last = nn.Linear(own.width, own.cross), nn.LayerNorm(own.cross)
        self.proj = nn.Sequential(nn.Linear(own.width, own.width), nn.GELU(), *last)

    def forward(self, states: Tensor) -> Tensor:
        """Map (batch, patches + 1, width) to (batch, patches + 1, cross)."""
        tokens: Tensor = self.proj(states)
        return tokens


class Resampler(nn.Module):
    """Tokens that look at the states of a picture, and at each other."""

    def __init__(self, own: IpAdapter) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, own.tokens, own.hidden))
        self.proj_in, self.proj_out = nn.Linear(own.width, own.hidden), nn.Linear(own.hidden, own.cross)
        self.norm_out = nn.LayerNorm(own.cross)
        self.layers = nn.ModuleList(
            nn.ModuleList([Looking(own.hidden, own.heads), _feed_forward(own.hidden)]) for _ in range(own.depth)
        )

    def forward(self, states: Tensor) -> Tensor:
        """Map (batch, patches + 1, width) to (batch, tokens, cross)."""
        states = self.proj_in(states)
        latents = self.latents.expand(states.shape[0], -1, -1)
        layers: Any = self.layers
        for look, feed in layers:
            latents = latents + look(states, latents)
            latents = latents + feed(latents)
        tokens: Tensor = self.norm_out(self.proj_out(latents))
        return tokens


class Looking(nn.Module):
    """Attention of tokens to states and tokens."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.heads = nn.LayerNorm(hidden), nn.LayerNorm(hidden), heads
        self.to_q = nn.Linear(hidden, heads * HEAD, bias=False)
        self.to_kv = nn.Linear(hidden, 2 * heads * HEAD, bias=False)
        self.to_out = nn.Linear(heads * HEAD, hidden, bias=False)

    def forward(self, states: Tensor, latents: Tensor) -> Tensor:
        """Map states (batch, patches + 1, hidden), latents (batch, tokens, hidden) to what is added to latents."""
        latents = self.norm2(latents)
        keys, values = self.to_kv(torch.cat([self.norm1(states), latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (
            torch.unflatten(part, 2, (self.heads, HEAD)).transpose(1, 2) for part in (self.to_q(latents), keys, values)
        )
        seen = nn.functional.scaled_dot_product_attention(q, k, v)
        added: Tensor = self.to_out(seen.transpose(1, 2).flatten(2))
        return added


def _feed_forward(hidden: int) -> nn.Sequential:
    wide = 4 * hidden
    return nn.Sequential(
        nn.LayerNorm(hidden), nn.Linear(hidden, wide, bias=False), nn.GELU(), nn.Linear(wide, hidden, bias=False)
    )
