"""A LoRA file: its tensors by module and part, its alphas, and the keys that found no place.

| keys after the module's name | kind |
| --- | --- |
| lora_down, lora_up, lora_mid; lora_A, lora_B; lora.down, lora.up; down, up | LoRA, LoCon |
| hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b, hada_t1, hada_t2 | LoHa |
| lokr_w1, lokr_w1_a, lokr_w1_b, lokr_w2, lokr_w2_a, lokr_w2_b, lokr_t2 | LoKr |
| diff, diff_b, w_norm, b_norm | the difference itself |
| dora_scale; lora_magnitude_vector | DoRA, with any of the first three |
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.adapters.names import PEFT, Module, Names
from latentrt.bundle.bundle import located_lora
from latentrt.bundle.tensors import FLOATS, Tensors, open_tensors
from latentrt.errors import AdapterError

HADA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
PARTS: Mapping[str, str] = {
    **{f".{stem}.weight": "down" for stem in ("lora_down", "lora.down", "lora_A", "lora_A.default", "down")},
    **{f".{stem}.weight": "up" for stem in ("lora_up", "lora.up", "lora_B", "lora_B.default", "up")},
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".dora_scale": "dora_scale",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".diff": "diff",
    ".w_norm": "diff",
    ".diff_b": "diff_b",
    ".b_norm": "diff_b",
    **{f".hada_{part}": f"hada_{part}" for part in HADA},
    **{f".lokr_{part}": f"lokr_{part}" for part in LOKR},
}
_SUFFIXES = tuple(sorted(PARTS, key=len, reverse=True))  # ".lora.down.weight" before ".down.weight"
SAVED_BY_PEFT, CONFIG, HEADER = "adapter_model.safetensors", "adapter_config.json", "lora_adapter_metadata"
_PATTERNS = set("*+?[](){}|$^\\")


@dataclass(frozen=True, slots=True)
class Group:
    """What a file has for one module.

    Attributes:
        module: of the model.
        keys: of the file, by part (the values of PARTS).
        alpha: from the file's configuration; None: it has none, or the key "alpha" says it.
        rooted: whether alpha is divided by the root of the rank, as rsLoRA does.
    """

    module: Module
    keys: Mapping[str, str]
    alpha: float | None = None
    rooted: bool = False


@dataclass(frozen=True, slots=True)
class LoraFile:
    """A LoRA file, matched with the names of a model."""

    tensors: Tensors
    groups: tuple[Group, ...]
    unmatched: tuple[str, ...]


def split(key: str) -> tuple[str, str]:
    """Return the module's name in a key and the part, one of PARTS' values; an empty part where it is none of them."""
    suffix = next((one for one in _SUFFIXES if key.endswith(one)), "")
    return key.removesuffix(suffix), PARTS.get(suffix, "")


def located(path: Path) -> Path:
    """Return the file of a LoRA that is given by its file, by peft's folder, or by the name of an embedded one.

    Raises:
        AdapterError: it is of another format than safetensors, or there is none.
    """
    own = located_lora(path)
    file = own / SAVED_BY_PEFT if own.is_dir() else own
    if file.suffix != ".safetensors":
        raise AdapterError(f"the LoRA is {path}", needed="a .safetensors file; others can run code")
    if not file.is_file():
        raise AdapterError(f"there is no file {file}", needed="a LoRA, as .safetensors")
    return file


def open_lora(path: Path, names: Names) -> LoraFile:
    """Read a file's header and match its keys with a model's modules.

    Args:
        path: as `located` takes it.
        names: see `names.dictionary`.

    Raises:
        AdapterError: it cannot be read, is no safetensors, is damaged, or says a module twice.
    """
    file = located(path)
    tensors = open_tensors(file, AdapterError)
    found: dict[Module, dict[str, str]] = {}
    stems: dict[Module, str] = {}
    unmatched = []
    for key, entry in tensors.entries.items():
        stem, part = split(key)
        if not part or stem not in names:
            unmatched.append(key)
            continue
        if entry.dtype not in FLOATS:
            raise AdapterError(f"{path}: {key} is {entry.dtype}", needed=f"one of {', '.join(FLOATS)}")
        module = names[stem]
        stems[module] = stem
        other = found.setdefault(module, {}).setdefault(part, key)
        if other != key:
            raise AdapterError(f"{path} has both {other} and {key}", needed="one for each module")
    settings = _settings(tensors)
    groups = (_group(path, module, stems[module], keys, settings) for module, keys in found.items())
    return LoraFile(tensors, tuple(groups), tuple(sorted(unmatched)))


def _group(path: Path, module: Module, stem: str, keys: Mapping[str, str], settings: Mapping[str, Any]) -> Group:
    """Return a module's part with the alpha that peft's configuration has for it."""
    prefix = f"{module.network}."
    own: Mapping[str, Any] = {k.removeprefix(prefix): v for k, v in settings.items() if k.startswith(prefix)}
    if not any("." in key for key in settings):
        own = settings
    known = {module.name, stem.removeprefix(PEFT).removeprefix(prefix).removeprefix(PEFT)}
    try:
        alpha = own.get("lora_alpha")
        for pattern, value in (own.get("alpha_pattern") or {}).items():
            if any(_fits(path, pattern, name) for name in known):
                alpha = value
                break
        return Group(module, keys, None if alpha is None else float(alpha), bool(own.get("use_rslora")))
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"{path} has a configuration that is damaged ({error})", needed="peft's") from error


def _fits(path: Path, pattern: str, name: str) -> bool:
    """Return whether one of peft's patterns names a module: its name, or the end of it. It is not run as a regex."""
    plain = pattern.replace("\\.", ".").removesuffix("$")
    whole, plain = plain.startswith("^"), plain.removeprefix("^")
    if set(plain) & _PATTERNS:
        raise AdapterError(f"{path} has an alpha for the pattern {pattern!r}", needed="names of modules")
    return name == plain or (not whole and name.endswith(f".{plain}"))


def _settings(tensors: Tensors) -> Mapping[str, Any]:
    """Return peft's configuration: the header's, or else the file's beside peft's own files; empty where it has none.

    Raises:
        AdapterError: it is no JSON object.
    """
    beside = tensors.path.with_name(CONFIG)
    text, place = tensors.metadata.get(HEADER), f"{tensors.path}'s header"
    try:
        if text is None and tensors.path.name == SAVED_BY_PEFT and beside.is_file():
            text, place = beside.read_text(encoding="utf-8"), str(beside)
        settings = {} if text is None else json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{place} has settings that cannot be read ({error})", needed="peft's, as JSON") from error
    if not isinstance(settings, dict):
        raise AdapterError(f"{place} has settings that are no object", needed="peft's, as JSON")
    return settings
