"""The UNet, trained together with the text encoder to take noise out of latents."""

from __future__ import annotations

from pathlib import Path
from random import Random

import torch
from captions import caption
from data import load
from diffusers import DDIMScheduler, UNet2DConditionModel
from text import WIDTH, ids_of, tokenizer_of
from torch import Tensor
from training import Run, device, half
from transformers import CLIPTextModel
from vae import CHANNELS

CAPTIONS, NOISES = 16, 2  # in a batch: a text is encoded once for several noises
DROPPED = 0.1  # the part of the captions that is empty, for classifier-free guidance (Ho and Salimans 2022)
TEXT_RATE = 0.3  # of the text encoder, relative to the UNet's


def new() -> UNet2DConditionModel:
    """One of 7.6 million parameters, for latents of 16 x 16 x 8."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 160),
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def schedule() -> DDIMScheduler:
    """Stable Diffusion's noise levels, with v-prediction (Salimans and Ho 2022)."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )


def train(work: Path, minutes: float) -> None:
    """Train both, and keep their averaged weights in `work`/unet/model and `work`/unet/text_encoder."""
    emoji, latents = load(work).emoji, torch.load(work / "latents.pt").to(device())
    encoder, unet = CLIPTextModel.from_pretrained(work / "text" / "model"), new()
    tokenizer, noises = tokenizer_of(work), schedule()
    run = Run(
        work / "unet",
        {"text encoder": encoder, "unet": unet},
        minutes=minutes,
        rate=4e-3,
        scales={"text encoder": TEXT_RATE},
    )
    order: list[int] = []
    for step in run:
        random = Random(step)
        while len(order) < CAPTIONS:
            order += random.sample(range(len(emoji)), len(emoji))
        chosen, order = order[:CAPTIONS], order[CAPTIONS:]
        texts = ["" if random.random() < DROPPED else caption(emoji[index], random) for index in chosen]
        x0 = latents[chosen].repeat(NOISES, 1, 1, 1)
        times, noise = timesteps(len(x0)), torch.randn_like(x0)
        with half():
            states = encoder(ids_of(tokenizer, texts)).last_hidden_state.repeat(NOISES, 1, 1)
            out = unet(noises.add_noise(x0, noise, times), times, states).sample
        errors = (out.float() - noises.get_velocity(x0, noise, times)).square().mean((1, 2, 3))
        run.learn(errors.mean(), noisy=errors[times > 800].mean().detach(), clean=errors[times < 200].mean().detach())
    with run.averaged():
        unet.save_pretrained(work / "unet" / "model")
        encoder.save_pretrained(work / "unet" / "text_encoder")


def timesteps(count: int) -> Tensor:
    """One from each part of the schedule, so that every batch has noise of all levels."""
    parts = (torch.arange(count) + torch.rand(count)) / count
    return (parts[torch.randperm(count)] * 1000).long().to(device())
