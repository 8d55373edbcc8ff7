"""From the trained UNet to a checkpoint in diffusers' layout, with its model card."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import denoiser
import pictures
from diffusers import DDPMPipeline

CARD = Path(__file__).with_name("CARD.md")
NAME = "pixels"  # the checkpoint's folder


def pack(work: Path) -> None:
    """Write `work`/pixels: the averaged weights in float16, and the schedule."""
    target = work / NAME
    shutil.rmtree(target, ignore_errors=True)
    unet, run = denoiser.trained(work)
    DDPMPipeline(unet.half(), denoiser.schedule()).save_pretrained(target)
    size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
    figures: dict[str, Any] = {
        "steps": run.step,
        "minutes": run.seconds / 60,
        "loss": _last_loss(work),
        "batch": denoiser.BATCH,
        "pictures": len(pictures.load(work)),
        "parameters": unet.num_parameters(),
        "bytes": size,
    }
    (work / "packed.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"{target}: {size / 1e6:.2f} MB, {run.step} steps in {run.seconds / 60:.0f} minutes")


def card(work: Path) -> None:
    """Write the model card into the checkpoint, with what was measured (`check` comes before)."""
    figures = json.loads((work / "packed.json").read_text()) | json.loads((work / "found.json").read_text())
    (work / NAME / "README.md").write_text(CARD.read_text().format(**figures))


def _last_loss(work: Path) -> float:
    """Return the mean loss of the last 20 seconds that were logged; NaN where none were."""
    log = work / "unet" / "log.csv"
    if not log.exists():
        return float("nan")
    with log.open(newline="") as file:
        return float(list(csv.DictReader(file))[-1]["loss"])
