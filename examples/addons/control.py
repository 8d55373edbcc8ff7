"""A ControlNet: pictures that follow a picture, grey or of edges, with a prompt or without."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from base import Base
from data import load
from diffusers import ControlNetModel, UNet2DConditionModel
from seen import hints, seen
from torch import Tensor, nn
from training import Run, batch_of, device, half, timesteps

CHANNELS = (8, 16, 32, 64)  # of the hint's embedding
PICTURES = 12  # in a batch
NOISIER = 0.6  # 1: noise of all levels alike; less: more of high ones, where a picture is decided
RATE = 4e-3
BOLD = 0.3  # the part of the batches whose edges are three pixels wide


def new(unet: UNet2DConditionModel) -> ControlNetModel:
    """One of 1.6 million parameters that begins as the UNet's way down, without what reads texts."""
    config = unet.config
    net = ControlNetModel(
        in_channels=config.in_channels,
        down_block_types=("DownBlock2D",) * len(config.block_out_channels),
        mid_block_type="UNetMidBlock2D",
        block_out_channels=config.block_out_channels,
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
        conditioning_embedding_out_channels=CHANNELS,
    )
    known = unet.state_dict()
    net.load_state_dict({name: known[name] for name in net.state_dict() if name in known}, strict=False)
    return net


def train(work: Path, kind: str, minutes: float) -> None:
    """Train the ControlNet of a kind of hints, and write `work`/emoji-NAME in float16, as diffusers does."""
    base, lessons = Base(), seen(load(work))
    shown = torch.from_numpy(hints(kind, lessons.pictures)).to(device())
    latents = base.latents(lessons.pictures, work / "seen.pt")
    net = new(base.unet)
    run = Run(work / kind, {"net": net}, minutes=minutes, rate=RATE)

    def losses(states: Tensor, chosen: Tensor, times: Tensor, bold: Tensor) -> dict[str, Tensor]:
        x0 = latents[chosen]
        noise = torch.randn_like(x0)
        noisy, hint = base.noises.add_noise(x0, noise, times), shown[chosen][:, None] / 255
        hint = torch.where(bold, nn.functional.max_pool2d(hint, 3, 1, 1), hint).expand(-1, 3, -1, -1)
        with half():
            down, middle = net(noisy, times, states, hint, return_dict=False)
            out = base.unet(
                *(noisy, times, states),
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        errors = (out.float() - base.noises.get_velocity(x0, noise, times)).square().mean((1, 2, 3))
        noisiest = times > 500
        return {"loss": errors.mean(), "noisy": (errors * noisiest).sum() / noisiest.sum()}

    for step in run:
        random = Random(step)
        chosen = random.sample(range(len(lessons.pictures)), batch_of(PICTURES))
        states = base.states([lessons.caption(number, random) for number in chosen])
        bold = torch.tensor(kind == "edges" and random.random() < BOLD)
        times = (1000 * (timesteps(len(chosen)) / 1000) ** NOISIER).long()
        run.learn(losses, states, torch.tensor(chosen), times, bold)
    with run.averaged():
        net.half().save_pretrained(work / f"emoji-{kind}")
