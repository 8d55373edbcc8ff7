"""A ControlNet or T2I-Adapter in a folder of its own, as diffusers saves one: config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.lone_vae import CONFIG
from latentrt_export.checkpoint.served import is_size, unsupported
from latentrt_export.checkpoint.weights import choose_weights

Config = Mapping[str, Any]
KIND, PART = "ControlNetModel", "controlnet"
UNION = "ControlNetUnionModel"  # one that reads several kinds of maps, and is told which
ADAPTER_KIND, ADAPTER = "T2IAdapter", "t2i_adapter"
FULL_XL = "full_adapter_xl"  # of its types, the one whose first features have half the latents' sides
TYPES = ("full_adapter", FULL_XL, "light_adapter")
OTHERS = ("ControlNetXSAdapter", "SparseControlNetModel", "MultiControlNetModel")
EMBEDDING = (16, 32, 96, 256)  # channels of the hint's embedding, where a config has none; a Union's has as many


def is_add_on(folder: Path) -> bool:
    """Return whether a folder holds a ControlNet or T2I-Adapter, or a network like one that is refused."""
    if (folder / "model_index.json").is_file() or not (folder / CONFIG).is_file():
        return False
    return read_json(folder / CONFIG).get("_class_name") in (KIND, UNION, ADAPTER_KIND, *OTHERS)


def add_on_folder(folder: Path, variant: str | None = None) -> tuple[str, Config, dict[str, Path], tuple[str, ...]]:
    """Return an add-on's part of a checkpoint, its config, files by their names in a bundle, what a user should know.

    Raises:
        ExportError: it is one that the engine cannot serve, or its weights are broken or missing.
        UnsafeWeightsError: its weights are pickled.
    """
    config = read_json(folder / CONFIG)
    part = ADAPTER if config.get("_class_name") == ADAPTER_KIND else PART
    (check_adapter if part == ADAPTER else check_controlnet)(config)
    weights = choose_weights({part: folder}, variant)[part]
    files = {f"{part}/{name}": path for name, path in weights.files.items()}
    return part, config, {**files, f"{part}/{CONFIG}": folder / CONFIG}, (weights.note,) if weights.note else ()


def check_controlnet(config: Config) -> None:
    """Refuse a ControlNet that the engine cannot serve. Raise ExportError."""
    union = config.get("_class_name") == UNION
    if not union and config.get("_class_name") != KIND:
        raise unsupported(f"a network of the class {config.get('_class_name')!r}", f"{KIND} or {UNION}")
    if union and not is_size(config.get("num_control_type", 6)):
        raise unsupported(f"a ControlNet with num_control_type {config['num_control_type']!r}", "a whole number")
    xl = config.get("addition_embed_type") is not None
    wanted = {
        "class_embed_type": None,
        "num_class_embeds": None,
        "encoder_hid_dim_type": None,
        "encoder_hid_dim": None,
        "addition_embed_type": "text_time" if xl else None,
        "conditioning_channels": 3,
    }
    for key, value in wanted.items():
        if config.get(key, value if key == "conditioning_channels" else None) != value:
            raise unsupported(f"a ControlNet with {key} {config.get(key)!r}", f"{key} {value!r}")
    order = config.get("controlnet_conditioning_channel_order", "rgb")
    orders = ("rgb",) if union else ("rgb", "bgr")
    if order not in orders:
        raise unsupported(f"a ControlNet with controlnet_conditioning_channel_order {order!r}", " or ".join(orders))
    for key in ("addition_time_embed_dim", "projection_class_embeddings_input_dim") if xl else ():
        if not is_size(config.get(key)):
            raise unsupported(f"a ControlNet with {key} {config.get(key)!r}", "a whole number in one for SDXL")
    for key in ("cross_attention_dim", "in_channels"):
        if not is_size(config.get(key, 1)):
            raise unsupported(f"a ControlNet with {key} {config.get(key)!r}", "a whole number")
    if not hint_levels(config) or not all(map(is_size, config.get("conditioning_embedding_out_channels") or EMBEDDING)):
        found = (
            f"a ControlNet with conditioning_embedding_out_channels {config['conditioning_embedding_out_channels']!r}"
        )
        raise unsupported(found, "whole numbers")


def check_adapter(config: Config) -> None:
    """Refuse a T2I-Adapter that the engine cannot serve. Raise ExportError."""
    kind, channels, factor = config.get("adapter_type", TYPES[0]), config.get("channels", [1]), adapter_factor(config)
    sizes = isinstance(channels, (list, tuple)) and bool(channels) and all(map(is_size, channels))
    for key, fits, wanted in (
        ("adapter_type", kind in TYPES, f"one of {', '.join(TYPES)}"),
        ("in_channels", config.get("in_channels", 3) in (1, 3), "3, or 1 of grey"),
        ("channels", sizes, "whole numbers"),
        ("num_res_blocks", is_size(config.get("num_res_blocks", 1)), "a whole number"),
        ("downscale_factor", is_size(factor) and not (kind == FULL_XL and factor % 2), "a whole number, even for XL"),
    ):
        if not fits:
            raise unsupported(f"a T2I-Adapter with {key} {config.get(key)!r}", wanted)


def adapter_factor(config: Config) -> Any:
    """Return what a T2I-Adapter divides a picture's sides by at once; diffusers' own default depends on no type."""
    return config.get("downscale_factor", 8)


def hint_levels(config: Config) -> int:
    """Return how many layers a hint's embedding has; each but the first halves its sides."""
    channels = config.get("conditioning_embedding_out_channels") or EMBEDDING
    return len(channels) if isinstance(channels, (list, tuple)) else 0
