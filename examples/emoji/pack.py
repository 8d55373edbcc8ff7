"""From trained networks to a checkpoint in diffusers' layout, and from there to a bundle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from data import load
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from text import tokenizer_of
from torch import nn
from transformers import CLIPTextModel
from unet import schedule

from latentrt_export.golden import golden_runs
from latentrt_export.to_bundle import export_bundle

CARD = Path(__file__).with_name("CARD.md")
NAME = "emoji"  # the checkpoint's folder, and so the bundle's id
OTHERS_SHOWN = 12


def pack(work: Path) -> None:
    """Write `work`/emoji, in float16 with the names of all emoji beside it, and export it to `work`/bundle."""
    target = work / NAME
    shutil.rmtree(target, ignore_errors=True)
    _pipeline(work).save_pretrained(target)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, target / "tokenizer" / name)
    for network in ("unet", "vae"):
        _forget_origin(target / network / "config.json")
    names = [emoji.name for emoji in load(work).emoji]
    (target / "captions.json").write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n")
    _export(work)


def card(work: Path) -> None:
    """Write the model card with what was measured (`check` comes before), and export again."""
    found = json.loads((work / "found.json").read_text())
    others = [f"{asked} ({made})" for asked, made in found["others"].items()]
    figures: dict[str, Any] = {
        **found,
        **json.loads((work / "vae" / "round_trip.json").read_text()),
        **{name: _millions(network) for name, network in _networks(work).items()},
        "share": found["found"] / found["captions"],
        "pairs": found["kinds"].get("pair", 0),
        "others": ", ".join(others[:OTHERS_SHOWN]) or "none",
    }
    (work / NAME / "README.md").write_text(CARD.read_text().format(**figures))
    _export(work)


def _networks(work: Path) -> dict[str, nn.Module]:
    half = torch.float16
    return {
        "vae": AutoencoderKL.from_pretrained(work / "vae" / "model", torch_dtype=half),
        "text": CLIPTextModel.from_pretrained(work / "unet" / "text_encoder", dtype=half),
        "unet": UNet2DConditionModel.from_pretrained(work / "unet" / "model", torch_dtype=half),
    }


def _forget_origin(config: Path) -> None:
    """Where the weights lay is nobody's business."""
    settings = json.loads(config.read_text())
    settings.pop("_name_or_path", None)
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _pipeline(work: Path) -> StableDiffusionPipeline:
    networks = _networks(work)
    return StableDiffusionPipeline(
        vae=networks["vae"],
        text_encoder=networks["text"],
        tokenizer=tokenizer_of(work),
        unet=networks["unet"],
        scheduler=schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def _export(work: Path) -> None:
    summary = export_bundle(str(work / NAME), work / "bundle", overwrite=True, golden=golden_runs)
    print(f"{work / 'bundle'}: {summary.total_bytes / 1e6:.1f} MB")
