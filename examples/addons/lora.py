"""A LoRA: all that the embedded model knows, in another look."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import numpy as np
import torch
from base import Base, asked
from data import load
from diffusers import StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn
from training import Run, batch_of, half, timesteps

RANK = 4
PLACES = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "net.0.proj", "net.2"]
PICTURES, NOISES = 8, 2  # in a batch
DROPPED = 0.1  # the part of the captions that is empty, for classifier-free guidance
RATE = 6e-3


def train(work: Path, look: str, minutes: float) -> None:
    """Train the LoRA of a look, and write `work`/emoji-NAME.safetensors in float16."""
    base, emoji = Base(), load(work).emoji
    shown: list[int] = json.loads((work / f"{look}.json").read_text())
    latents = base.latents(np.load(work / f"{look}.npy"), work / f"{look}.pt")
    base.unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=PLACES, init_lora_weights="gaussian"))
    weights = nn.ParameterList([each for each in base.unet.parameters() if each.requires_grad])
    run = Run(work / look, {"lora": weights}, minutes=minutes, rate=RATE)

    def losses(states: Tensor, chosen: Tensor, times: Tensor) -> dict[str, Tensor]:
        x0 = latents[chosen].repeat(NOISES, 1, 1, 1)
        noise = torch.randn_like(x0)
        with half():
            out = base.unet(base.noises.add_noise(x0, noise, times), times, states.repeat(NOISES, 1, 1)).sample
        errors = (out.float() - base.noises.get_velocity(x0, noise, times)).square().mean((1, 2, 3))
        return {"loss": errors.mean(), "noisy": (errors * (times > 500)).sum() / (times > 500).sum()}

    for step in run:
        random = Random(step)
        chosen = random.sample(range(len(shown)), batch_of(PICTURES))
        texts = [asked(emoji[shown[number]], random, DROPPED) for number in chosen]
        run.learn(losses, base.states(texts), torch.tensor(chosen), timesteps(NOISES * len(chosen)))
    with run.averaged():
        kept = {name: each.half() for name, each in get_peft_model_state_dict(base.unet).items()}
        StableDiffusionPipeline.save_lora_weights(work, kept, weight_name=f"emoji-{look}.safetensors")
