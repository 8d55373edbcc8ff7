"""diffusers' own pipeline in float32, eager or with its UNet and its VAE decoder compiled."""

import os

from protocol import serve


def load(settings):
    """Load the pipeline. Compiled, it draws a picture in one step, because it compiles at the first call."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = settings["cache"]
    import diffusers
    import numpy as np
    import torch

    torch.set_num_threads(settings["threads"])
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        settings["model"], dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = getattr(diffusers, settings["scheduler"]).from_config(pipe.scheduler.config)

    def draw(task):
        width, height = task["size"]
        return pipe(
            task["prompts"],
            num_inference_steps=task["steps"],
            guidance_scale=task["guidance"],
            width=width,
            height=height,
            latents=torch.from_numpy(np.load(task["latents"])),
        ).images

    if settings["options"].get("compile"):
        pipe.unet = torch.compile(pipe.unet, dynamic=False)
        pipe.vae.decode = torch.compile(pipe.vae.decode, dynamic=False)
        draw(settings["first"])
    return draw


serve(load)
