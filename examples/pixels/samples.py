"""Sheets of samples, drawn by diffusers, and how near they are to the pictures of the training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import checkpoint
import denoiser
import numpy as np
import pictures
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from numpy.typing import NDArray
from PIL import Image

COUNT, COLUMNS = 64, 8
GAP, SCALE = 4, 3  # of a sheet: pixels between pictures, and how many times as large they are shown
SEED = 0
SOLVERS = {"ddpm": DDPMScheduler, "ddim": DDIMScheduler, "dpmpp-2m": DPMSolverMultistepScheduler}
CHECKED = (("ddpm", 1000), ("ddim", 30), ("dpmpp-2m", 30))
COPY = 25.0  # dB: a sample that is as near to a picture is called a copy of it

Pixels = NDArray[np.uint8]  # (N, 32, 32, 3)


def sample(work: Path, solver: str, steps: int) -> None:
    """Draw a sheet from the last saved state of the training, which may be still running."""
    unet, run = denoiser.trained(work)
    path = work / f"step-{run.step:06}-{solver}-{steps}.png"
    sheet(draw(DDPMPipeline(unet, denoiser.schedule()), solver, steps)).save(path)
    print(path)


def check(work: Path) -> None:
    """Draw sheets from the packed checkpoint in float32, and write what is found into `work`/found.json."""
    pipeline = DDPMPipeline.from_pretrained(work / checkpoint.NAME, torch_dtype=torch.float32)
    found = {}
    for solver, steps in CHECKED:
        drawn = draw(pipeline, solver, steps)
        sheet(drawn).save(work / f"{solver}-{steps}.png")
        nearest = decibels(drawn, pictures.load(work))
        copies = int((nearest >= COPY).sum())
        found[solver] = {"steps": steps, "count": COUNT, "copies": copies, "median": float(np.median(nearest))}
        print(f"{solver}, {steps} steps: {copies} of {COUNT} are copies, {np.median(nearest):.1f} dB in the middle")
    (work / "found.json").write_text(json.dumps(found, indent=1) + "\n")


def draw(pipeline: DDPMPipeline, solver: str, steps: int) -> Pixels:
    """Draw `COUNT` pictures, always from the same noise."""
    ours = DDPMPipeline(pipeline.unet, SOLVERS[solver].from_config(pipeline.scheduler.config))
    ours.set_progress_bar_config(desc=f"{solver}, {steps} steps")
    noise = torch.Generator().manual_seed(SEED)
    drawn = ours(batch_size=COUNT, num_inference_steps=steps, generator=noise, output_type="np").images
    return np.rint(255 * drawn).astype(np.uint8)


def sheet(drawn: Sequence[Pixels] | Pixels) -> Image.Image:
    """Put pictures on white, `COLUMNS` in a row."""
    side = pictures.SIDE + GAP
    rows = -(-len(drawn) // COLUMNS)
    canvas = np.full((GAP + rows * side, GAP + COLUMNS * side, 3), 255, np.uint8)
    for number, picture in enumerate(drawn):
        top, left = (GAP + side * place for place in divmod(number, COLUMNS))
        canvas[top : top + pictures.SIDE, left : left + pictures.SIDE] = picture
    return Image.fromarray(canvas.repeat(SCALE, 0).repeat(SCALE, 1))


def decibels(drawn: Pixels, known: Pixels) -> NDArray[np.float64]:
    """Return how near each picture is to the nearest known one: PSNR in decibels, (N,)."""
    errors = [np.square(known - each.astype(np.float64)).mean((1, 2, 3)).min() for each in drawn]
    return 10 * np.log10(255**2 / np.maximum(errors, 1e-3))
