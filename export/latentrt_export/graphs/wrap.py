"""The networks of a checkpoint as torch modules with flat tensor inputs and outputs.

The names of inputs and outputs are the contract between a bundle's graphs and the engine's conditioners.
Everything is computed in float32: weights that are stored in half precision are widened when they are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection

from latentrt.errors import ExportError
from latentrt.model.conditioners.ip_adapter import IMAGE_EMBEDS, IMAGE_STATES, KEYS, VALUES
from latentrt_export.checkpoint.add_ons import ip_adapter
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.lone_control import ADAPTER, PART, UNION, adapter_factor, hint_levels
from latentrt_export.checkpoint.served import (
    INPUTS,
    KL,
    LOW,
    NOISE_LEVELS,
    TINY,
    kind_beside,
    sizes_read,
    text_config,
    upscales_latents,
    vae_class,
)
from latentrt_export.graphs.modules.adapter import Adapter
from latentrt_export.graphs.modules.controlnet import ControlNet, ControlNetUnion, Hint
from latentrt_export.graphs.modules.ip_adapter import ImageEncoder, ImagePrompt
from latentrt_export.graphs.modules.text import PenultimateTextEncoder, TextEncoder
from latentrt_export.graphs.modules.unet import PixelUNet, UNet
from latentrt_export.graphs.modules.upscaler import LatentUpscaler, PooledTextEncoder
from latentrt_export.graphs.modules.vae import TinyEncoder, VaeDecoder, VaeEncoder
from latentrt_export.graphs.parts.control import hint_name, residual_names

Axes = Mapping[int, str]
IMAGE_AXES: Axes = {0: "batch", 2: "height", 3: "width"}
BATCH: Axes = {0: "batch"}
TEXT_AXES: Axes = {0: "batch", 1: "tokens"}
# Tracing with a batch of 1 would make torch.export take the batch for a constant.
TRACE_BATCH = 2
TOKENS = 77  # of a ControlNet's example: it has no tokenizer to tell
MOST_SKIPS = 11  # layers of a text encoder that a request may leave out: as many as A1111's web UI offers
# Every wrapper keeps its model in the attribute `model`: names of parameters are passes.PREFIX + the checkpoint's.


@dataclass(frozen=True, slots=True)
class Input:
    """One input of a network: an example for tracing, and the names of its axes that may change."""

    name: str
    example: Tensor
    axes: Axes


@dataclass(frozen=True, slots=True)
class Network:
    """A module ready to be traced, with its inputs in call order and the names of its outputs.

    `weights` is the folder of the checkpoint whose safetensors hold the parameters.
    """

    module: nn.Module
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    weights: str


def load_network(root: Path, name: str, *, tokens: int = 77) -> Network:
    """Load one network of the checkpoint at `root` in float32, on the CPU, ready for tracing.

    Args:
        root: a diffusers checkpoint whose weights are safetensors, each network in a folder of its name.
        name: text_encoder, text_encoder_2, unet, vae_decoder or vae_encoder; hint or controlnet; t2i_adapter;
            image_encoder or ip_adapter.
        tokens: length of a text chunk (77).
    """
    network = _LOADERS[name](root, name, tokens)
    network.module.eval().requires_grad_(False)
    return network


def is_xl(root: Path) -> bool:
    """Return whether a checkpoint has SDXL's second text encoder: text states are then those before the last layer."""
    return (root / "text_encoder_2").is_dir()


def _text_encoder(root: Path, name: str, tokens: int) -> Network:
    pooled = name == "text_encoder_2"
    kind = CLIPTextModelWithProjection if pooled else CLIPTextModel
    model = _load(kind, root / name)
    layers = model.config.num_hidden_layers
    upscaler = upscales_latents(read_json(root / "unet" / "config.json"))
    skips = min(MOST_SKIPS, layers - 1 if is_xl(root) else layers)
    wrapper = PooledTextEncoder if upscaler else PenultimateTextEncoder if is_xl(root) else TextEncoder
    pooled = pooled or upscaler
    ids = torch.arange(TRACE_BATCH * tokens).reshape(TRACE_BATCH, tokens) % model.config.vocab_size
    outputs = ("text_states", *(["text_embeds"] if pooled else []), *(["skipped"] if skips else []))
    return Network(wrapper(model, skips), (Input("input_ids", ids, BATCH),), outputs, name)


def _unet(root: Path, name: str, tokens: int) -> Network:
    if not (root / "vae").is_dir():
        return _pixel_unet(root)
    model = _load(UNet2DConditionModel, root / "unet")
    config = model.config
    if upscales_latents(config):
        return _latent_upscaler(model, tokens)
    sizes = {
        "sample": ((config.out_channels, 16, 24), IMAGE_AXES),
        "timestep": ((), BATCH),
        "encoder_hidden_states": ((tokens, config.cross_attention_dim), TEXT_AXES),
    }
    if is_xl(root):
        text = text_config(read_json(root / "text_encoder_2" / "config.json"))
        numbers = sizes_read(config, text)
        embeds = config.projection_class_embeddings_input_dim - numbers * config.addition_time_embed_dim
        sizes |= {"text_embeds": ((embeds,), BATCH), "time_ids": ((numbers,), BATCH)}
    extra = config.in_channels - config.out_channels
    kind = kind_beside(extra, config.out_channels)
    if kind is not None:
        sizes[INPUTS[kind]] = ((extra, 16, 24), IMAGE_AXES)
    if config.time_cond_proj_dim is not None:
        sizes["timestep_cond"] = ((config.time_cond_proj_dim,), BATCH)
    inputs = _examples(sizes)
    if kind == LOW:
        inputs = (*inputs, Input("noise_level", torch.zeros(TRACE_BATCH, dtype=torch.int64), BATCH))
    return Network(UNet(model), inputs, ("out",), "unet")


def _latent_upscaler(model: Any, tokens: int) -> Network:
    config, latents = model.config, ((model.config.out_channels - 1, 16, 24), IMAGE_AXES)
    sizes = {
        "sample": latents,
        "sigma": ((), BATCH),
        "encoder_hidden_states": ((tokens, config.cross_attention_dim), TEXT_AXES),
        "text_embeds": ((config.time_cond_proj_dim - NOISE_LEVELS,), BATCH),
        "low_latents": latents,
    }
    return Network(LatentUpscaler(model), _examples(sizes), ("out",), "unet")


def _pixel_unet(root: Path) -> Network:
    model = _load(UNet2DModel, root / "unet")
    config, side = model.config, 4 * 2 ** (len(model.config.block_out_channels) - 1)
    inputs = _examples({"sample": ((config.in_channels, side, side), IMAGE_AXES), "timestep": ((), BATCH)})
    if config.class_embed_type == "timestep":
        inputs = (*inputs, *_examples({"class_labels": ((), BATCH)}))
    elif config.num_class_embeds is not None:
        inputs = (*inputs, Input("class_labels", torch.zeros(TRACE_BATCH, dtype=torch.int64), BATCH))
    return Network(PixelUNet(model), inputs, ("out",), "unet")


def _vae_decoder(root: Path, name: str, tokens: int) -> Network:
    model = _vae(root)
    inputs = _examples({"latents": ((model.config.latent_channels, 16, 24), IMAGE_AXES)})
    return Network(VaeDecoder(model), inputs, ("image",), "vae")


def _vae_encoder(root: Path, name: str, tokens: int) -> Network:
    model = _vae(root)
    inputs = _examples({"image": ((model.config.in_channels, 128, 192), IMAGE_AXES)})
    if isinstance(model, AutoencoderTiny):
        return Network(TinyEncoder(model), inputs, ("latents",), "vae")
    return Network(VaeEncoder(model), inputs, ("moments",), "vae")


def _vae(root: Path) -> Any:
    kinds = {KL: AutoencoderKL, TINY: AutoencoderTiny}
    return _load(kinds[vae_class(read_json(root / "vae" / "config.json"))], root / "vae")


def _hint(root: Path, name: str, tokens: int) -> Network:
    model = _load(_control_class(root), root / PART)
    factor = 2 ** (hint_levels(model.config) - 1)
    inputs = _examples({"picture": ((model.config.conditioning_channels, 16 * factor, 24 * factor), IMAGE_AXES)})
    return Network(Hint(model), inputs, ("hint",), PART)


def _controlnet(root: Path, name: str, tokens: int) -> Network:
    model = _load(_control_class(root), root / PART)
    union = isinstance(model, ControlNetUnionModel)
    config, skips = model.config, len(model.controlnet_down_blocks)
    sizes: dict[str, tuple[tuple[int, ...], Axes]] = {
        "sample": ((config.in_channels, 16, 24), IMAGE_AXES),
        "timestep": ((), BATCH),
        "encoder_hidden_states": ((TOKENS, config.cross_attention_dim), TEXT_AXES),
        "hint": ((config.block_out_channels[0], 16, 24), IMAGE_AXES),
        **({"control_type": ((config.num_control_type,), BATCH)} if union else {}),
    }
    if config.addition_embed_type is not None:
        numbers = 6 * config.addition_time_embed_dim
        sizes |= {
            "text_embeds": ((config.projection_class_embeddings_input_dim - numbers,), BATCH),
            "time_ids": ((6,), BATCH),
        }
    wrapper = ControlNetUnion if union else ControlNet
    return Network(wrapper(model), _examples(sizes), tuple(residual_names(skips + 1)), PART)


def _control_class(root: Path) -> Any:
    return ControlNetUnionModel if read_json(root / PART / "config.json")["_class_name"] == UNION else ControlNetModel


def _t2i_adapter(root: Path, name: str, tokens: int) -> Network:
    model = _load(T2IAdapter, root / ADAPTER)
    factor = adapter_factor(model.config)
    inputs = _examples({"picture": ((model.config.in_channels, 16 * factor, 24 * factor), IMAGE_AXES)})
    return Network(Adapter(model), inputs, tuple(map(hint_name, range(len(model.adapter.body)))), ADAPTER)


def _image_encoder(root: Path, name: str, tokens: int) -> Network:
    states = ip_adapter.read_ip_adapter(root / ip_adapter.FILE).reads_states
    model = _load(CLIPVisionModelWithProjection, root / name)
    side = model.config.image_size
    inputs = _examples({"pixel_values": ((3, side, side), BATCH)})
    return Network(ImageEncoder(model, states=states), inputs, (IMAGE_STATES if states else IMAGE_EMBEDS,), name)


def _ip_adapter(root: Path, name: str, tokens: int) -> Network:
    own = ip_adapter.read_ip_adapter(root / ip_adapter.FILE)
    module = ImagePrompt(own)
    weights = load_file(root / ip_adapter.FILE)
    module.model.load_state_dict({key: value.to(torch.float32) for key, value in weights.items()})
    sides = (read_json(root / ip_adapter.ENCODER / "config.json"), ip_adapter.ENCODERS)
    size, patch = (next(one[key] for one in sides if key in one) for key in ("image_size", "patch_size"))
    shape = ((size // patch) ** 2 + 1, own.width) if own.reads_states else (own.width,)
    inputs = _examples({IMAGE_STATES if own.reads_states else IMAGE_EMBEDS: (shape, BATCH)})
    outputs = (f"{kind}{layer}" for layer in range(len(own.channels)) for kind in (KEYS, VALUES))
    return Network(module, inputs, tuple(outputs), name)


_LOADERS: Mapping[str, Callable[[Path, str, int], Network]] = {
    "text_encoder": _text_encoder,
    "text_encoder_2": _text_encoder,
    "unet": _unet,
    "vae_decoder": _vae_decoder,
    "vae_encoder": _vae_encoder,
    "hint": _hint,
    "controlnet": _controlnet,
    "t2i_adapter": _t2i_adapter,
    "image_encoder": _image_encoder,
    "ip_adapter": _ip_adapter,
}


def _examples(sizes: Mapping[str, tuple[tuple[int, ...], Axes]]) -> tuple[Input, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(
        Input(name, torch.rand(TRACE_BATCH, *shape, generator=generator), axes) for name, (shape, axes) in sizes.items()
    )


def _load(kind: Any, folder: Path) -> Any:
    model, info = kind.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):  # the libraries would fill them with random numbers
        raise ExportError(
            f"{folder.name} has no weights for {missing[0]} ({len(missing)} are missing)",
            needed=f"every weight of a {kind.__name__}",
            fix="update diffusers and transformers: older ones do not know the names that newer ones write",
        )
    return model
