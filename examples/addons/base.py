"""The embedded model in torch, as it is: what add-ons are trained around, and what their lessons are made of."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from random import Random

import numpy as np
import torch
from captions import caption
from data import Emoji
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from numpy.typing import NDArray
from text import ids_of
from torch import Tensor
from training import device, half
from transformers import CLIPTextModel, CLIPTokenizer

from latentrt.bundle.bundle import EMBEDDED

AT_ONCE = 64


class Base:
    """The embedded model's networks, frozen.

    Attributes:
        unet: it takes gradients through, and learns nothing.
        noises: its noise levels.
    """

    def __init__(self) -> None:
        self.unet = UNet2DConditionModel.from_pretrained(EMBEDDED / "unet").float().to(device()).requires_grad_(False)
        self.noises = DDIMScheduler.from_pretrained(EMBEDDED / "scheduler")
        self._vae = AutoencoderKL.from_pretrained(EMBEDDED / "vae").float().to(device()).requires_grad_(False)
        self._text = CLIPTextModel.from_pretrained(EMBEDDED / "text_encoder").float().to(device()).requires_grad_(False)
        self._tokenizer = CLIPTokenizer.from_pretrained(EMBEDDED / "tokenizer")

    def states(self, texts: list[str]) -> Tensor:
        """What the UNet reads of texts, (N, 77, 192)."""
        with torch.no_grad(), half():
            states: Tensor = self._text(ids_of(self._tokenizer, texts).to(device())).last_hidden_state
        return states.float()

    def latents(self, pictures: NDArray[np.uint8], path: Path) -> Tensor:
        """Latents of RGB pictures (N, 128, 128, 3): (N, 4, 16, 16), scaled as the UNet has them.

        They are kept in the file `path`, as they take minutes on a CPU.
        """
        if not path.exists():
            with torch.no_grad():
                means = [self._vae.encode(part).latent_dist.mean for part in _batches(pictures)]
            torch.save(torch.cat(means).cpu() * self._vae.config.scaling_factor, path)
        latents: Tensor = torch.load(path).to(device())
        if len(latents) != len(pictures):
            raise SystemExit(f"{path} is of other pictures: delete it")
        return latents


def _batches(pictures: NDArray[np.uint8]) -> Iterable[Tensor]:
    for first in range(0, len(pictures), AT_ONCE):
        part = torch.from_numpy(pictures[first : first + AT_ONCE].copy()).to(device())
        yield part.movedim(-1, 1) / 127.5 - 1


def asked(emoji: Emoji, random: Random, dropped: float) -> str:
    """A caption, or none for a part of them."""
    return "" if random.random() < dropped else caption(emoji, random)
