"""Which weights of a network are used: names of files that diffusers and transformers have written, and variants.

    diffusion_pytorch_model.safetensors                      one file
    diffusion_pytorch_model.fp16.safetensors                 of the variant fp16
    diffusion_pytorch_model.safetensors.index.json           shards: diffusion_pytorch_model-00001-of-00002.safetensors
    diffusion_pytorch_model.safetensors.index.fp16.json      diffusion_pytorch_model.fp16-00001-of-00002.safetensors
    diffusion_pytorch_model.safetensors.fp16.index.json      diffusion_pytorch_model-00001-of-00002.fp16.safetensors
    diffusion_pytorch_model.fp16.safetensors.index.json      as huggingface_hub writes it

Text encoders have `model` in place of `diffusion_pytorch_model`. The form with `.fp16.index.json` is an older one of
diffusers, which it still reads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentrt.bundle.bundle import PICKLES
from latentrt.bundle.tensors import open_tensors
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.files import AGAIN, read_json

Variants = Mapping[str, Path]  # a file or the index of shards for each variant; "" is the plain one
_VARIANT = r"\.(?P<variant>(?!\w+-\d{5}-of-\d{5}\.)[^.]+)"
_INDEX = rf"\.safetensors\.index({_VARIANT})?\.json"
_OLD_INDEX = rf"\.safetensors{_VARIANT}\.index\.json"
_INDEX_OF_HUB = rf"{_VARIANT}\.safetensors\.index\.json"
_FILE = rf"({_VARIANT})?\.safetensors"
_ADAPTER = re.compile(r"(^|[._])lora([._]|$)|lora_|(^|\.)base_layer\.|hada_w|lokr_w", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that are used of one network.

    Attributes:
        files: one safetensors file, or an index and its shards, by their names in a bundle.
        note: what a user should know of the choice; empty where it is what was asked for.
    """

    files: Mapping[str, Path]
    note: str


def stem_of(part: str) -> str:
    """Return what the names of a network's weight files begin with."""
    return "model" if part.startswith(("text_encoder", "image_encoder")) else "diffusion_pytorch_model"


def choose_weights(homes: Mapping[str, Path], variant: str | None) -> dict[str, Weights]:
    """Choose the weights of each network: the variant where it exists, else the plain ones, else the only ones.

    Args:
        homes: the folder of each network.
        variant: the one that was asked for; None: the plain one.

    Raises:
        ExportError: no network has the variant; or one has several others and no plain weights; or files are missing,
            broken, or hold an adapter that is not merged.
        UnsafeWeightsError: a network has pickled weights only.
    """
    found = {part: _variants(home, part) for part, home in homes.items()}
    known = sorted({name for variants in found.values() for name in variants})
    if variant is not None and variant not in known:
        raise ExportError(f"no network has {_named(variant)} weights", needed=f"one of {', '.join(map(_named, known))}")
    return {part: _chosen(part, homes[part], variants, variant) for part, variants in found.items()}


def _variants(folder: Path, part: str) -> Variants:
    """Return a network's weights by variant, as its library looks for them.

    diffusers takes shards where one file is beside them, transformers the file.
    """
    stem = stem_of(part)
    indexes = (_OLD_INDEX, _INDEX)
    order = (_INDEX_OF_HUB, *((*indexes, _FILE) if stem == "model" else (_FILE, *indexes)))  # the last one wins
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [m for pattern in order for name in names if (m := re.fullmatch(re.escape(stem) + pattern, name))]
    found = {m["variant"] or "": folder / m.string for m in matches}
    if not found:
        raise _no_weights(folder, stem)
    return found


def _chosen(part: str, folder: Path, variants: Variants, variant: str | None) -> Weights:
    wanted = variant or ""
    chosen, note = wanted, ""
    if wanted not in variants:
        if "" not in variants and len(variants) > 1:
            raise ExportError(
                f"{folder} has the weights {', '.join(sorted(variants))} and no {_named(wanted)} ones",
                needed="one of them by name",
                fix=f"--variant {min(variants)}",
            )
        chosen = "" if "" in variants else next(iter(variants))
        note = f"{part}: no {_named(wanted)} weights, taking the {_named(chosen)} ones"
    return Weights(_files(variants[chosen], stem_of(part)), note)


def _named(variant: str) -> str:
    return variant or "plain"


def _files(path: Path, stem: str) -> dict[str, Path]:
    """Return the files of a choice by their names in a bundle, each of them checked."""
    if path.suffix == ".safetensors":
        _check(path)
        return {f"{stem}.safetensors": path}
    shards = sorted(set(_shards(path)))
    for shard in shards:
        _check(path.parent / shard)
    return {f"{stem}.safetensors.index.json": path} | {shard: path.parent / shard for shard in shards}


def _shards(path: Path) -> Iterable[str]:
    """Yield the name of each tensor's shard in an index."""
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ExportError(f"{path} has no weight_map", needed="a file for each weight, by name", fix=AGAIN)
    for shard in places.values():
        inside = isinstance(shard, str) and Path(shard).name == shard and shard.endswith(".safetensors")
        if not inside or not (path.parent / shard).is_file():
            raise ExportError(f"{path} names the shard {shard!r}", needed="a safetensors beside it", fix=AGAIN)
        yield shard


def _check(path: Path) -> None:
    """Refuse a file that is broken, or that holds an adapter which is not merged into the weights."""
    for name in open_tensors(path).entries:
        if _ADAPTER.search(name):
            raise ExportError(
                f"{path} holds a LoRA that is not merged ({name})",
                needed="weights with the LoRA in them, or without it",
                fix="in diffusers: pipe.fuse_lora(); pipe.unload_lora_weights(); pipe.save_pretrained(FOLDER)",
            )


def _no_weights(folder: Path, stem: str) -> ExportError | UnsafeWeightsError:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    others = [path for path in files if path.suffix == ".safetensors"]
    if others:
        return ExportError(
            f"{others[0]} has a name that diffusers does not load",
            needed=f"{stem}.safetensors, or {stem}.VARIANT.safetensors",
            fix=f"rename it to {stem}.safetensors, if it holds all of this network",
        )
    pickles = [path for path in files if path.suffix in PICKLES]
    if pickles:
        return UnsafeWeightsError(
            f"{pickles[0]} holds pickled weights, and there are no safetensors beside it",
            needed="safetensors; pickles can run code",
            fix="use a revision that has safetensors, or convert it where you trust it: save_pretrained(FOLDER)",
        )
    return ExportError(f"{folder} has no weights", needed=f"{stem}.safetensors", fix=AGAIN)
