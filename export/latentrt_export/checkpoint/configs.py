"""Write what a diffusers folder has besides weights: configs, CLIP's tokenizers, the scheduler, model_index.json."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt_export.checkpoint.presets.configs import Preset

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = Path(__file__).with_name("clip") / "merges.txt.gz"
FORM = "0.42.0"  # the diffusers whose form the files have; its inpainting pipeline asks for one
ENTRIES = 49_408  # of CLIP's vocabulary: bytes, bytes at a word's end, merges, start and end


def write_configs(model: Preset, folder: Path) -> None:
    """Write every file of a checkpoint but its weights and its model card.

    Args:
        model: its networks, tokenizers, scheduler and pipeline.
        folder: where they go; made if missing.
    """
    index: dict[str, Any] = {"_class_name": model.pipeline, "_diffusers_version": FORM, **model.index}
    for name, (kind, config) in model.networks.items():
        clip = kind.startswith("CLIP")
        index[name] = ["transformers" if clip else "diffusers", kind]
        own = {"architectures": [kind], "model_type": "clip_text_model"} if clip else {"_class_name": kind}
        write_json(folder / name / "config.json", own | config)
    for name, pad in model.tokenizers.items():
        index[name] = ["transformers", "CLIPTokenizer"]
        write_tokenizer(folder / name, pad)
    index["scheduler"] = ["diffusers", model.scheduler["_class_name"]]
    write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    write_json(folder / "model_index.json", index)


def weights_path(folder: Path, name: str, kind: str) -> Path:
    """Return where a checkpoint has the weights of its network `name`, whose class is `kind`."""
    stem = "model" if kind.startswith("CLIP") else "diffusion_pytorch_model"
    return folder / name / f"{stem}.safetensors"


def write_tokenizer(folder: Path, pad: str) -> None:
    """Write CLIP's tokenizer as the published checkpoints have it: vocab.json, merges.txt, tokenizer_config.json.

    Args:
        folder: where they go.
        pad: the padding token: "<|endoftext|>" (SD 1, SDXL's first), or "!" (SD 2, SDXL's second).
    """
    merges = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    letters = _letters()
    merged = [merge.replace(" ", "") for merge in merges]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *merged, START, END]
    write_json(folder / "vocab.json", {word: i for i, word in enumerate(words)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    rules = {"model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    write_json(folder / "tokenizer_config.json", tokens | rules)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write a JSON object; its folder is made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(data), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _letters() -> list[str]:
    """Return the 256 characters for bytes in byte-level BPE: themselves where printable, else from 256 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    return [*map(chr, sorted(printable)), *(chr(256 + i) for i in range(256 - len(printable)))]
