"""LoRAs merged into a model's weights: in float32, rounded once to what the weight is stored as."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.adapters.changes import Change, change_of
from latentrt.adapters.files import LoraFile, open_lora, split
from latentrt.adapters.given import Lora
from latentrt.adapters.names import TEXT, TEXT_2, UNET, dictionary
from latentrt.bundle.tensors import FLOATS, Tensors, as_stored, open_tensors
from latentrt.errors import AdapterError

NETWORKS = (UNET, TEXT, TEXT_2)  # that LoRAs change
FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL", 1280: "SDXL's refiner"}
MOST_LISTED = 8  # of a file of which no key has a place


class Weight(NamedTuple):
    """A weight of the model: its network, and its name in the network's safetensors."""

    network: str
    name: str


Added = tuple[Change, float]  # with its strength
Base = Mapping[str, Mapping[str, Tensors]]  # of each network, the file of each weight


@dataclass(frozen=True, slots=True)
class Merge:
    """The weights that some LoRAs change.

    Attributes:
        base: the model's weights.
        added: what is added to each, in the order in which the LoRAs were given.
        notes: what a user should know: keys that found no place.
    """

    base: Base
    added: Mapping[Weight, Sequence[Added]]
    notes: tuple[str, ...] = ()

    def value(self, weight: Weight) -> NDArray[Any]:
        """Return a changed weight as it is stored (bfloat16: as uint16).

        Raises:
            AdapterError: a number is not finite, or too large for the stored dtype.
        """
        file = self.base[weight.network][weight.name]
        array = file.floats(weight.name)
        bias = weight.name.endswith(".bias")
        with np.errstate(over="ignore", invalid="ignore"):
            for change, strength in self.added[weight]:
                array = (change.bias if bias else change.weight)(array, strength)
        dtype = file.entries[weight.name].dtype
        stored = as_stored(np.ascontiguousarray(array, np.float32), dtype)
        if not np.isfinite(stored if dtype != "BF16" else array).all():
            files = ", ".join(change.tensors.path.name for change, _ in self.added[weight])
            raise AdapterError(f"{files} makes {weight.name} too large for {dtype}", needed="a smaller strength")
        return stored


def base_of(files: Mapping[str, Iterable[Path]]) -> Base:
    """Return a model's weights by network and name.

    Args:
        files: the safetensors of each network; where two have a name, the later one counts.
    """
    return {
        network: {name: tensors for tensors in map(open_tensors, paths) for name in tensors.entries}
        for network, paths in files.items()
    }


def merge_of(base: Base, loras: Sequence[Lora], *, allow_unmatched: bool = False) -> Merge:
    """Match LoRAs with a model's weights; only headers are read.

    Args:
        base: the model's weights.
        loras: in the order in which they are merged.
        allow_unmatched: whether keys that find no place are left out, and noted; they are an error otherwise.

    Raises:
        AdapterError: a file cannot be read, has keys without a place, or was made for another family or other sizes.
    """
    names = dictionary({network: list(weights) for network, weights in base.items()})
    added: dict[Weight, list[Added]] = {}
    notes = []
    for lora in loras:
        file = open_lora(lora.path, names)
        _check_family(lora, file, base)
        if file.unmatched:
            if not allow_unmatched or not file.groups:
                raise _unmatched(lora, file)
            notes.append(f"{lora.path.name}: {len(file.unmatched)} keys have no place: {', '.join(file.unmatched)}")
        for group in file.groups:
            change = change_of(file.tensors, group)
            for weight in _weights(change, base):
                if strength := lora.strength(weight.network):
                    added.setdefault(weight, []).append((change, strength))
    return Merge(base, added, tuple(notes))


def _weights(change: Change, base: Base) -> Iterator[Weight]:
    """Yield the weights that a change is for, their sizes checked."""
    network, name = change.group.module
    if change.has_weight:
        rows, columns = change.rows_and_columns
        shape = _shape(change, Weight(network, f"{name}.weight"), base)
        wide = int(np.prod(shape[1:], dtype=np.int64))
        if (rows, columns) != (shape[0], wide):
            raise AdapterError(
                f"{change.tensors.path} changes the {network}'s {name} as {rows} x {columns}",
                needed=f"{shape[0]} x {wide}, as the model has it",
                fix="take a LoRA that was made for this family of models",
            )
        yield Weight(network, f"{name}.weight")
    if change.has_bias:
        _shape(change, Weight(network, f"{name}.bias"), base)
        yield Weight(network, f"{name}.bias")


def _shape(change: Change, weight: Weight, base: Base) -> tuple[int, ...]:
    file = base[weight.network].get(weight.name)
    if file is None:
        needed = "a LoRA for this model's structure"
        raise AdapterError(f"{change.tensors.path} changes {weight.name}, which the model has not", needed=needed)
    entry = file.entries[weight.name]
    if entry.dtype not in FLOATS:
        raise AdapterError(f"{weight.name} is {entry.dtype}", needed=f"one of {', '.join(FLOATS)}")
    return entry.shape


def _check_family(lora: Lora, file: LoraFile, base: Base) -> None:
    """Refuse a file that reads texts of another width than the UNet: it was made for another family."""
    widths = {tensors.entries[name].shape[1] for name, tensors in base.get(UNET, {}).items() if _reads_text(name)}
    for key, entry in file.tensors.entries.items():
        stem, part = split(key)
        if part != "down" or not _reads_text(f"{stem}.weight") or len(entry.shape) < 2:
            continue
        if widths and entry.shape[1] not in widths:
            raise AdapterError(
                f"{lora.path} was made for {_family(entry.shape[1])}",
                needed=f"a LoRA for {' or '.join(map(_family, sorted(widths)))}",
            )


def _reads_text(name: str) -> bool:
    """Return whether a weight is that of a text's keys."""
    return name.endswith((".attn2.to_k.weight", "_attn2_to_k.weight", ".attn2.processor.to_k_lora.weight"))


def _family(width: int) -> str:
    texts = f"texts of {width} numbers"
    return f"{FAMILIES[width]} ({texts})" if width in FAMILIES else texts


def _unmatched(lora: Lora, file: LoraFile) -> AdapterError:
    keys = file.unmatched
    found = f"{lora.path} has {len(keys)} of {len(file.tensors.entries)} keys without a place in this model"
    if not file.groups:
        needed = "a LoRA that was made for this family of models"
        return AdapterError(f"{found}: {', '.join(keys[:MOST_LISTED])}, ...", needed=needed)
    found = f"{found}: {', '.join(keys)}"
    return AdapterError(found, needed="a place for each", fix="--allow-unmatched merges the others (allow_unmatched)")
