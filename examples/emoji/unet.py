"""The UNet, trained together with the text encoder to take noise out of latents."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from random import Random

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from lessons import Lessons
from text import WIDTH, ids_of, tokenizer_of
from torch import Tensor
from training import Run, batch_of, device, half, timesteps
from transformers import CLIPTextModel
from vae import CHANNELS

CAPTIONS, NOISES = 16, 2  # in a batch: a text is encoded once for several noises
DROPPED = 0.1  # the part of the captions that is empty, for classifier-free guidance (Ho and Salimans 2022)
TEXT_RATE = 0.3  # of the text encoder, relative to the UNet's


def new() -> UNet2DConditionModel:
    """One of 7.6 million parameters, for latents of 16 x 16 x 4."""
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
    lessons, tokenizer, noises = Lessons(work), tokenizer_of(work), schedule()
    encoder, unet = CLIPTextModel.from_pretrained(work / "text" / "model"), new()
    latents = lessons.latents.to(device())
    run = Run(
        work / "unet",
        {"text encoder": encoder, "unet": unet},
        minutes=minutes,
        rate=4e-3,
        scales={"text encoder": TEXT_RATE},
    )

    def losses(ids: Tensor, chosen: Tensor, times: Tensor) -> dict[str, Tensor]:
        x0 = latents[chosen].repeat(NOISES, 1, 1, 1)
        noise = torch.randn_like(x0)
        with half():
            states = encoder(ids).last_hidden_state.repeat(NOISES, 1, 1)
            out = unet(noises.add_noise(x0, noise, times), times, states).sample
        errors = (out.float() - noises.get_velocity(x0, noise, times)).square().mean((1, 2, 3))
        parts = {"noisy": (times > 800).float(), "clean": (times < 200).float()}
        return {"loss": errors.mean()} | {name: (errors * part).sum() / part.sum() for name, part in parts.items()}

    order = lessons.order(run.step)
    for step in run:
        random, chosen = Random(step), list(islice(order, batch_of(CAPTIONS)))
        texts = ["" if random.random() < DROPPED else lessons.caption(number, random) for number in chosen]
        times = timesteps(NOISES * len(chosen))
        run.learn(losses, ids_of(tokenizer, texts), torch.tensor(chosen), times)
    with run.averaged():
        unet.save_pretrained(work / "unet" / "model")
        encoder.save_pretrained(work / "unet" / "text_encoder")
