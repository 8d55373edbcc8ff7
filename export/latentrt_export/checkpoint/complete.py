"""Whether a network can be loaded: its config against its class, and its weights' names and shapes against both.

The network is made on torch's meta device, where tensors have no numbers, and of the weights only the headers are
read. So a checkpoint is refused in a second or two, before the first of its networks is exported.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    ControlNetModel,
    ControlNetUnionModel,
    T2IAdapter,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from latentrt.bundle.tensors import open_tensors
from latentrt.errors import ExportError
from latentrt.values import is_number
from latentrt_export.checkpoint.add_ons import ip_adapter
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.lone_control import ADAPTER, PART, UNION
from latentrt_export.checkpoint.served import KL, TINY, vae_class
from latentrt_export.checkpoint.source import TEXT, TEXT_2, UNET, VAE, Checkpoint
from latentrt_export.checkpoint.weights import stem_of

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]
Maker = Callable[[str, Config], nn.Module]  # of a part's name, for errors, and its config
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # of 2022


def check_complete(checkpoint: Checkpoint, part: str) -> None:
    """Refuse a network that lacks weights, or whose config or weights are of another kind than its class needs.

    Raises:
        ExportError: one of these; the message names the network and the weight.
        Exception: whatever torch, diffusers or transformers raise where a config makes no network.
    """
    if part == ip_adapter.PART:  # checked when it was opened
        return
    with torch.device("meta"):
        network = MAKERS[_kind(checkpoint, part)](part, checkpoint.configs[part])
    needed = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = _stored(checkpoint, part)
    places = {name: _place(name, stored) for name in needed}
    if missing := sorted(name for name, place in places.items() if place is None):
        raise ExportError(
            f"{part} has no weights for {missing[0]} ({len(missing)} are missing)",
            needed=f"every weight of a {type(network).__name__}, as its config.json describes it",
            fix="check that config.json belongs to these weights, and that diffusers is not older than them",
        )
    for name, place in places.items():
        if place is not None and stored[place] != needed[name]:
            raise ExportError(
                f"{part} has {place} of the shape {list(stored[place])}",
                needed=f"{list(needed[name])}, as its config.json describes it",
                fix="check that config.json belongs to these weights",
            )


def _kind(checkpoint: Checkpoint, part: str) -> str:
    if part == VAE:
        return vae_class(checkpoint.configs[VAE])
    if part == PART and checkpoint.configs[PART].get("_class_name") == UNION:
        return UNION
    pixels = part == UNET and VAE not in checkpoint.configs
    return "pixels" if pixels else part


def _of_diffusers(kind: Any) -> Maker:
    defaults = {name: one.default for name, one in inspect.signature(kind.__init__).parameters.items()}

    def make(part: str, config: Config) -> nn.Module:
        _check_numbers(defaults, part, config)
        network: nn.Module = kind.from_config(dict(config))
        return network

    return make


def _of_transformers(kind: Any, settings: Any = CLIPTextConfig) -> Maker:
    def make(part: str, config: Config) -> nn.Module:
        _check_numbers(settings().to_dict(), part, config)
        network: nn.Module = kind(settings.from_dict(dict(config)))
        return network

    return make


def _check_numbers(defaults: Mapping[str, Any], part: str, config: Config) -> None:
    """Refuse other values in the place of numbers: some classes take them, and fail when they are used."""
    for name, default in defaults.items():
        value = config.get(name, default)
        if is_number(default) and (isinstance(value, (str, dict)) or (type(default) is float and not is_number(value))):
            raise ExportError(f"{part}/config.json has {name} {value!r}", needed="a number")


MAKERS: Mapping[str, Maker] = {
    TEXT: _of_transformers(CLIPTextModel),
    TEXT_2: _of_transformers(CLIPTextModelWithProjection),
    UNET: _of_diffusers(UNet2DConditionModel),
    "pixels": _of_diffusers(UNet2DModel),
    KL: _of_diffusers(AutoencoderKL),
    TINY: _of_diffusers(AutoencoderTiny),
    PART: _of_diffusers(ControlNetModel),
    UNION: _of_diffusers(ControlNetUnionModel),
    ADAPTER: _of_diffusers(T2IAdapter),
    ip_adapter.ENCODER: _of_transformers(CLIPVisionModelWithProjection, CLIPVisionConfig),
}


def _stored(checkpoint: Checkpoint, part: str) -> Shapes:
    """Return the shapes of the stored weights, by the names under which the libraries load them."""
    files = {name: path for name, path in checkpoint.files.items() if name.startswith(f"{part}/")}
    index = files.get(f"{part}/{stem_of(part)}.safetensors.index.json")
    weights = [path for name, path in files.items() if name.endswith(".safetensors")]
    shapes = {name: shape for path in weights for name, shape in open_tensors(path).shapes.items()}
    if index is not None:
        named = read_json(index)["weight_map"]
        return {name: shape for name, shape in shapes.items() if name in named}
    return {_todays(name): shape for name, shape in shapes.items()}  # diffusers renames none in shards


def _todays(name: str) -> str:
    """Return today's name of a weight of an attention of 2022."""
    old = re.fullmatch(r"(.+\.attentions\.\d+)\.(\w+)\.(weight|bias)", name)
    return f"{old[1]}.{OLD_ATTENTION[old[2]]}.{old[3]}" if old and old[2] in OLD_ATTENTION else name


def _place(name: str, stored: Shapes) -> str | None:
    """Return the stored name of a weight: its own, or one with another prefix (text encoders had "text_model.")."""
    if name in stored:
        return name
    longer = (each for each in stored if each.endswith(f".{name}"))
    return next(longer, None) or next((each for each in stored if name.endswith(f".{each}")), None)
