"""A checkpoint with LoRAs merged into its weights: copies of the files that they change, in a folder of their own."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from latentrt.adapters.given import Lora
from latentrt.adapters.merge import NETWORKS, Merge, base_of, merge_of
from latentrt.errors import ExportError

if TYPE_CHECKING:
    from latentrt_export.checkpoint.source import Checkpoint


def with_loras(checkpoint: Checkpoint, loras: Sequence[Lora], room: Path, *, allow_unmatched: bool) -> Checkpoint:
    """Return the checkpoint with LoRAs merged into it.

    Args:
        checkpoint: whose safetensors have the names of diffusers and transformers.
        loras: in the order in which they are merged.
        room: a folder for the copies of its files.
        allow_unmatched: see `merge_of`.

    Raises:
        AdapterError: as of `merge_of` and `Merge.value`.
        ExportError: the checkpoint is a VAE.
        OSError: `room` cannot be written.
    """
    networks = [name for name in NETWORKS if name in checkpoint.configs]
    if not networks:
        raise ExportError(f"--lora with {checkpoint.id}, which is a VAE", needed="a model", fix="leave out --lora")
    weights = {name: path for name, path in checkpoint.files.items() if name.endswith(".safetensors")}
    own = {name: [path for file, path in weights.items() if file.startswith(f"{name}/")] for name in networks}
    merge = merge_of(base_of(own), loras, allow_unmatched=allow_unmatched)
    changed = {merge.base[weight.network][weight.name].path for weight in merge.added}
    copies = {name: path for name, path in weights.items() if path in changed}
    files = {name: _copy(merge, path, room / name) for name, path in copies.items()}
    notes = (*checkpoint.notes, *(f"LoRA {lora} merged" for lora in loras), *merge.notes)
    return replace(checkpoint, files={**checkpoint.files, **files}, notes=notes)


def _copy(merge: Merge, source: Path, target: Path) -> Path:
    """Write a file of weights with those that are changed in their places; one of them is in memory at a time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    with target.open("r+b") as file:
        for weight in merge.added:
            tensors = merge.base[weight.network][weight.name]
            if tensors.path == source:
                file.seek(tensors.entries[weight.name].offset)
                file.write(merge.value(weight).tobytes())
    return target
