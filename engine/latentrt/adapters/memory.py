"""LoRAs merged in memory: a bundle some of whose weights are others than its files have."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import NamedTuple

from latentrt.adapters.given import Lora
from latentrt.adapters.merge import NETWORKS, Base, Merge, Weight, merge_of
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.initializers import Initializer, initializers
from latentrt.bundle.spec import FP32
from latentrt.bundle.tensors import Tensors, open_tensors
from latentrt.errors import AdapterError, AdapterWarning

PREFIX = "model."  # of the name of a weight that lies in the graph itself
EXPORT = "merge it when exporting: latentrt export CHECKPOINT BUNDLE --lora FILE"


Place = tuple[str, int]  # a file of a bundle, and an offset in it


def with_loras(bundle: Bundle, loras: Sequence[Lora], *, allow_unmatched: bool = False) -> Bundle:
    """Return a bundle with LoRAs merged into its files' weights, in memory; warn of keys that are left out.

    Golden runs are left out, since they are the bundle's own, and its id says what is merged. LoRAs that were merged
    before are left out too; without new ones it is `Bundle.base`.

    Args:
        bundle, loras, allow_unmatched: as of `merge_into`.

    Raises:
        AdapterError: as of `merge_into` and `Merge.value`.
    """
    base = bundle.base
    if not loras:
        return base
    merge, places = merge_into(base, loras, allow_unmatched=allow_unmatched)
    for note in merge.notes:
        warnings.warn(note, AdapterWarning, stacklevel=3)
    replaced, merged = {place: merge.value(weight) for place, weight in places.items()}, tuple(map(str, loras))
    spec = replace(base.spec, id="+".join([base.spec.id, *merged]), golden=())
    return replace(base, spec=spec, replaced=replaced, merged=merged, plain=base)


def merge_into(
    bundle: Bundle, loras: Sequence[Lora], *, allow_unmatched: bool = False
) -> tuple[Merge, dict[Place, Weight]]:
    """Return how LoRAs change a bundle's weights, and where each changed weight lies.

    Args:
        bundle: exported from a checkpoint, so that its weights have the checkpoint's names.
        loras: in the order in which they are merged.
        allow_unmatched: see `merge_of`.

    Raises:
        AdapterError: as of `merge_of`; or the bundle's weights have other names, or lie in its graphs.
    """
    folders, read, base = held_by(bundle)
    merge = merge_of(base, loras, allow_unmatched=allow_unmatched)
    places = {}
    for weight in merge.added:
        if f"{PREFIX}{weight.name}" in {each.name for each in read[weight.network] if each.file is None}:
            found = f"{weight.name} of the {weight.network} lies in its graph"
            raise AdapterError(found, needed="weights in a file beside it", fix=EXPORT)
        tensors = base[weight.network][weight.name]
        file = f"{folders[weight.network]}/{tensors.path.name}"
        places[file, tensors.entries[weight.name].offset] = weight
    return merge, places


class Held(NamedTuple):
    """A bundle's weights of the networks that LoRAs change, by network.

    Attributes:
        folders: of their graphs and weights.
        read: what the float32 graphs there read.
        base: the file of each weight.
    """

    folders: Mapping[str, str]
    read: Mapping[str, Sequence[Initializer]]
    base: Base


def held_by(bundle: Bundle) -> Held:
    """Return a bundle's weights; only headers are read.

    Raises:
        AdapterError: they have other names than a checkpoint's.
    """
    folders = {name: folder_of(bundle, name) for name in NETWORKS if name in bundle.spec.networks}
    read = {name: _initializers(bundle, folder) for name, folder in folders.items()}
    base = {name: _weights(bundle, folder, read[name]) for name, folder in folders.items()}
    if not any(base.values()):
        found = f"{bundle.spec.id} has no weights of a network that LoRAs change, under their names"
        raise AdapterError(found, needed="a bundle made from a checkpoint")
    return Held(folders, read, base)


def folder_of(bundle: Bundle, network: str) -> str:
    """Return the folder of a network's graphs and weights."""
    return str(PurePosixPath(bundle.spec.networks[network].variants[FP32].path).parent)


def _initializers(bundle: Bundle, folder: str) -> list[Initializer]:
    """Return the initializers of a folder's float32 graphs."""
    networks = [name for name in bundle.spec.networks if folder_of(bundle, name) == folder]
    paths = [bundle.path(bundle.spec.networks[name].variants[FP32].path) for name in networks]
    return [each for path in paths for each in initializers(path)]


def _weights(bundle: Bundle, folder: str, read: Sequence[Initializer]) -> dict[str, Tensors]:
    """Return the file of each weight of a folder; where two files have it, the one that graphs read."""
    names = (name for name in bundle.files if name.endswith(".safetensors"))
    files = [open_tensors(bundle.path(name)) for name in sorted(names) if str(PurePosixPath(name).parent) == folder]
    used = {(each.file, each.offset) for each in read}
    found: dict[str, Tensors] = {}
    for tensors in files:
        for name, entry in tensors.entries.items():
            if name not in found or (tensors.path.name, entry.offset) in used:
                found[name] = tensors
    return found
