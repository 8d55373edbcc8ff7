"""The VAE's decoder, alone: the latents stay as they are, so what was trained on them stays good."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from training import Run, device, half
from vae import BATCH, as_input, keep, loss_of, pictures

NOISE = 0.03  # of latents of unit variance: what a UNet draws is never quite a picture's latents


def train(work: Path, minutes: float) -> None:
    """Train on whole pictures and their latents, and keep the VAE in `work`/vae/model."""
    images, latents = pictures(work), torch.load(work / "latents.pt")
    vae = AutoencoderKL.from_pretrained(work / "vae" / "model")
    parts = {"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}
    run = Run(work / "decoder", parts, minutes=minutes, rate=2e-3, until=0.2)
    for _ in run:
        chosen = torch.randint(len(images), (BATCH,))
        x, z = as_input(images[chosen]), latents[chosen].to(device())
        with half():
            y = vae.decode((z + NOISE * torch.randn_like(z)) / vae.config.scaling_factor).sample
        loss, figures = loss_of(y.float(), x)
        run.learn(loss, **figures)
    with run.averaged():
        keep(work, vae.to(device()).eval(), images)
