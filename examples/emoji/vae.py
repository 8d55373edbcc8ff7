"""The VAE: an AutoencoderKL with a latent space of its own, trained from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data import SIDE, load, on_white
from diffusers import AutoencoderKL
from torch import Tensor, nn
from training import Run, device, half

BATCH = 8
CROP, CROPPED = 64, 0.75  # pixels, and the part of the time in which only squares of that size are looked at
WIDTHS = (16, 24, 48, 96)
CHANNELS = 8  # of the latents; with four, as Stable Diffusion has, small pictures lose what makes them
KL = 1e-4  # relative to the mean error of a number; SD's own is smaller still


def new() -> AutoencoderKL:
    """One of 1.5 million parameters: 128 x 128 x 3 to 16 x 16 x 8."""
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
    images, vae = pictures(work), new()
    run = Run(work / "vae", {"vae": vae}, minutes=minutes, rate=5e-3, until=0.1)
    for _ in run:
        x = as_input(some(images, CROP if run.share < CROPPED else SIDE))
        with half():
            latents = vae.encode(x).latent_dist
            y = vae.decode(latents.sample()).sample
        kl = latents.kl().mean() / latents.mean[0].numel()
        loss, figures = loss_of(y.float(), x)
        run.learn(loss + KL * kl, **figures, kl=kl.detach())
    with run.averaged():
        keep(work, vae, images)


def some(images: Tensor, side: int) -> Tensor:
    """A batch of random squares of random pictures, half of them mirrored: words mind that, this network need not."""
    squares = []
    for index in torch.randint(len(images), (BATCH,)).tolist():
        top, left = torch.randint(SIDE - side + 1, (2,)).tolist()
        square = images[index, :, top : top + side, left : left + side]
        squares.append(square.flip(-1) if torch.rand(()) < 0.5 else square)
    return torch.stack(squares)


def loss_of(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """How wrong a decoded picture is, and figures of it for the log."""
    squares, edges = nn.functional.mse_loss(y, x), gradient_error(y, x)
    return (y - x).abs().mean() + 10 * squares + 0.5 * edges, {"psnr": psnr(squares), "edges": edges.detach()}


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


def keep(work: Path, vae: AutoencoderKL, images: Tensor) -> None:
    """Measure the round trip, scale the latents to unit variance, and write both down."""
    means, ratios = [], []
    for x in map(as_input, images.split(32)):
        mean = vae.encode(x).latent_dist.mean
        y = vae.decode(mean).sample.clamp(-1, 1)
        means.append(mean.cpu())
        ratios += [float(psnr(nn.functional.mse_loss(a, b))) for a, b in zip(y, x, strict=True)]
    latents = torch.cat(means)
    scale = 1 / float(latents.std())
    vae.register_to_config(scaling_factor=scale)
    vae.save_pretrained(work / "vae" / "model")
    torch.save(latents * scale, work / "latents.pt")
    figures = {"mean": sum(ratios) / len(ratios), "worst": min(ratios)}
    (work / "vae" / "round_trip.json").write_text(json.dumps(figures))
    print("round trip: {mean:.2f} dB on average, {worst:.2f} at worst".format(**figures))
