"""The VAE: an AutoencoderKL with a latent space of its own, trained from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from data import SIDE, load, on_white
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import Run, batch_of, device, half

BATCH = 8
CROP, CROPPED = 64, 0.75  # pixels, and the part of the time in which only squares of that size are looked at
WIDTHS = (16, 24, 48, 96)
CHANNELS = 4  # of the latents, as Stable Diffusion has
KL = 1e-4  # relative to the mean error of a number; SD's own is smaller still


def new() -> AutoencoderKL:
    """One of 1.5 million parameters: 128 x 128 x 3 to 16 x 16 x 4."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        sample_size=SIDE,
    )


def pictures(work: Path) -> Tensor:
    """All of them, uint8 (N, 3, 128, 128), on white."""
    return torch.from_numpy(on_white(load(work).pictures)).permute(0, 3, 1, 2).contiguous()


def as_input(pixels: Tensor) -> Tensor:
    """uint8 to -1..1, where the networks work."""
    return pixels.to(device()).float().div(127.5).sub(1)


def train(work: Path, minutes: float) -> None:
    """Train, and keep the checkpoint in `work`/vae/model and every picture's latents in `work`/latents.pt."""
    images, vae = pictures(work).to(device()), new()
    combined = torch.from_numpy(np.load(work / "combined.npy", mmap_mode="c")).permute(0, 3, 1, 2)
    run = Run(work / "vae", {"vae": vae}, minutes=minutes, rate=5e-3, until=0.1)

    def losses(pixels: Tensor) -> dict[str, Tensor]:
        x = as_input(pixels)
        with half():
            latents = vae.encode(x).latent_dist
            y = vae.decode(latents.sample()).sample
        kl = latents.kl().mean() / latents.mean[0].numel()
        figures = loss_of(y.float(), x)
        return {**figures, "loss": figures["loss"] + KL * kl, "kl": kl}

    for _ in run:
        run.learn(losses, some(images, batch_of(BATCH), CROP if run.share < CROPPED else SIDE))
    with run.averaged():
        keep(work, vae, images, combined)


def some(images: Tensor, count: int, side: int) -> Tensor:
    """Random squares of random pictures, uint8 (count, 3, side, side), half of them mirrored: words would mind that."""
    on = images.device
    chosen = torch.randint(len(images), (count, 1, 1, 1), device=on)
    along = torch.arange(side, device=on)
    rows, columns = torch.randint(SIDE - side + 1, (2, count, 1), device=on) + along
    mirrored = torch.rand(count, 1, device=on) < 0.5
    columns = torch.where(mirrored, columns.flip(-1), columns)
    colours = torch.arange(3, device=on)[:, None, None]
    return images[chosen, colours, rows[:, None, :, None], columns[:, None, None, :]]


def loss_of(y: Tensor, x: Tensor) -> dict[str, Tensor]:
    """How wrong decoded pictures are, and figures of it for the log."""
    squares, edges = nn.functional.mse_loss(y, x), gradient_error(y, x)
    loss = (y - x).abs().mean() + 10 * squares + 0.5 * edges
    return {"loss": loss, "psnr": psnr(squares), "edges": edges}


def gradient_error(a: Tensor, b: Tensor) -> Tensor:
    """The mean difference of neighbours' differences, at three scales: an absolute error alone blurs edges."""
    total = torch.zeros((), device=a.device)
    for scale in (1, 2, 4):
        d = nn.functional.avg_pool2d(a - b, scale)
        total = total + (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    return total / 3


def psnr(squares: Tensor) -> Tensor:
    """Decibels, from the mean squared error of numbers in -1..1."""
    return -10 * torch.log10(squares.detach() / 4)


def keep(work: Path, vae: AutoencoderKL, images: Tensor, combined: Tensor) -> None:
    """Measure the round trip, and write down the VAE and the latents of emoji (of unit variance) and combinations."""
    means, ratios = [], []
    for x in map(as_input, [*images.split(64), *combined.split(64)]):
        mean = vae.encode(x).latent_dist.mean
        y = vae.decode(mean).sample.clamp(-1, 1)
        means.append(mean.cpu())
        ratios += psnr((y - x).square().mean((1, 2, 3))).tolist()
    latents, single = torch.cat(means), ratios[: len(images)]
    scale = 1 / float(latents[: len(images)].std())
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(work / "vae" / "model")
    torch.save(latents * scale, work / "latents.pt")
    others = ratios[len(images) :]
    figures = {"mean": mean_of(single), "worst": min(single), "mean_combined": mean_of(others)}
    (work / "vae" / "round_trip.json").write_text(json.dumps(figures))
    print("round trip: {mean:.2f} dB, {worst:.2f} at worst; combinations: {mean_combined:.2f} dB".format(**figures))


def mean_of(values: list[float]) -> float:
    """Their mean."""
    return sum(values) / len(values)
