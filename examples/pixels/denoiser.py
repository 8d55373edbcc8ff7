"""The UNet, trained to take noise out of pictures."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pictures
import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor
from training import Run, batch_of, device, half, timesteps

BATCH = 32
WIDTHS = (32, 48, 64, 64)
ATTENTION = 2  # the level from which on there is attention
MINUTES = 55.0
RATE = 4e-3
AVERAGE = 0.999


def new() -> UNet2DModel:
    """Return one of 1.4 million parameters, for pictures of 32 x 32 x 3."""
    attention = [level >= ATTENTION for level in range(len(WIDTHS))]
    return UNet2DModel(
        sample_size=pictures.SIDE,
        in_channels=3,
        out_channels=3,
        down_block_types=["AttnDownBlock2D" if each else "DownBlock2D" for each in attention],
        up_block_types=["AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attention)],
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=16,
        norm_num_groups=16,
    )


def schedule() -> DDPMScheduler:
    """Return the cosine schedule (Nichol and Dhariwal 2021) with v-prediction (Salimans and Ho 2022).

    At its last timestep nothing is left of the picture, so sampling has to begin there: "trailing", or few steps begin
    where a picture would still be visible.
    """
    return DDPMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        clip_sample=True,
        timestep_spacing="trailing",
    )


def train(work: Path, minutes: float = MINUTES) -> None:
    """Train; weights and averaged weights are kept in `work`/unet/state.pt."""
    pixels = torch.from_numpy(pictures.load(work)).permute(0, 3, 1, 2)
    images = pixels.to(device()).float().div(127.5).sub(1)
    noises, unet = schedule(), new()
    for module in unet.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())  # plain products: on a CPU the fused ones have a slow backward pass
    run = run_of(work, unet, minutes)

    def losses(chosen: Tensor, times: Tensor) -> dict[str, Tensor]:
        x0 = images[chosen]
        noise = torch.randn_like(x0)
        with half():
            out = unet(noises.add_noise(x0, noise, times), times).sample
        errors = (out.float() - noises.get_velocity(x0, noise, times)).square().mean((1, 2, 3))
        parts = {"noisy": (times >= 500).float(), "clean": (times < 500).float()}
        return {"loss": errors.mean()} | {name: (errors * part).sum() / part.sum() for name, part in parts.items()}

    for _ in run:
        count = batch_of(BATCH)
        run.learn(losses, torch.randint(len(images), (count,)), timesteps(count))


def trained(work: Path) -> tuple[UNet2DModel, Run]:
    """Return a UNet with the averaged weights of the run in `work`, on the CPU, and that run."""
    if not (work / "unet" / "state.pt").exists():
        raise SystemExit(f"{work}/unet has no state.pt: train for two minutes first")
    unet = new()
    run = run_of(work, unet)
    with run.averaged():
        return deepcopy(unet).cpu(), run


def run_of(work: Path, unet: UNet2DModel, minutes: float = MINUTES) -> Run:
    """Return the run of a UNet: as far as it has come in `work`, or a new one."""
    return Run(work / "unet", {"unet": unet}, minutes=minutes, rate=RATE, average=AVERAGE)
