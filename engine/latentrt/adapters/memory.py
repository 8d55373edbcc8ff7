"""LoRAs merged in memory: a bundle some of whose weights are others than its files have."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from numpy.typing import NDArray

from latentrt.adapters.given import Lora
from latentrt.adapters.merge import NETWORKS, base_of, merge_of
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.initializers import initializers
from latentrt.bundle.spec import FP32
from latentrt.errors import AdapterError, AdapterWarning

PREFIX = "model."  # of the name of a weight that lies in the graph itself
EXPORT = "merge it when exporting: latentrt export CHECKPOINT BUNDLE --lora FILE"


def with_loras(bundle: Bundle, loras: Sequence[Lora], *, allow_unmatched: bool = False) -> Bundle:
    """Return a bundle with LoRAs merged into its weights, in memory; warn of keys that are left out.

    Golden runs are left out, since they are the bundle's own, and its id says what is merged.

    Args:
        bundle: exported from a checkpoint, so that its weights have the checkpoint's names.
        loras: in the order in which they are merged.
        allow_unmatched: see `merge_of`.

    Raises:
        AdapterError: as of `merge_of` and `Merge.value`; or the bundle's weights cannot be replaced.
    """
    folders = {name: folder_of(bundle, name) for name in NETWORKS if name in bundle.spec.networks}
    files = {name: _weights(bundle, folder) for name, folder in folders.items()}
    if not any(files.values()):
        found = f"{bundle.spec.id} has no weights of a network that LoRAs change, under their names"
        raise AdapterError(found, needed="a bundle made from a checkpoint")
    merge = merge_of(base_of(files), loras, allow_unmatched=allow_unmatched)
    for note in merge.notes:
        warnings.warn(note, AdapterWarning, stacklevel=3)
    inside = {name: _inside(bundle, folder) for name, folder in folders.items()}
    replaced: dict[tuple[str, int], NDArray[Any]] = {}
    for weight in merge.added:
        if weight.name in inside[weight.network]:
            found = f"{weight.name} of the {weight.network} lies in its graph"
            raise AdapterError(found, needed="weights in a file beside it", fix=EXPORT)
        tensors = merge.base[weight.network][weight.name]
        place = f"{folders[weight.network]}/{tensors.path.name}"
        replaced[place, tensors.entries[weight.name].offset] = merge.value(weight)
    name = "+".join([bundle.spec.id, *map(str, loras)])
    return replace(bundle, spec=replace(bundle.spec, id=name, golden=()), replaced=replaced)


def folder_of(bundle: Bundle, network: str) -> str:
    """Return the folder of a network's graphs and weights."""
    return str(PurePosixPath(bundle.spec.networks[network].variants[FP32].path).parent)


def _weights(bundle: Bundle, folder: str) -> list[Any]:
    names = (name for name in bundle.files if name.endswith(".safetensors"))
    return [bundle.path(name) for name in sorted(names) if str(PurePosixPath(name).parent) == folder]


def _inside(bundle: Bundle, folder: str) -> set[str]:
    """Return the names of the weights that lie in the graphs of a folder."""
    networks = [name for name in bundle.spec.networks if folder_of(bundle, name) == folder]
    paths = [bundle.path(bundle.spec.networks[name].variants[FP32].path) for name in networks]
    own = [each for path in paths for each in initializers(path) if each.file is None]
    return {each.name.removeprefix(PREFIX) for each in own if each.name.startswith(PREFIX)}
