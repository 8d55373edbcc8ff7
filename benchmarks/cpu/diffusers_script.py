"""A diffusers user's script for the same picture: FOLDER TARGET PROMPT STEPS SEED GUIDANCE."""

import sys

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

folder, target, prompt, steps, seed, guidance = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(int(seed))
pipe(prompt, num_inference_steps=int(steps), guidance_scale=float(guidance), generator=generator).images[0].save(target)
