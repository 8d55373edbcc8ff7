"""Full-size models, by names and shapes alone: their configs are those that are published."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt_export.checkpoint.presets.configs import PRESETS
from latentrt_export.checkpoint.presets.make import CLASSES
from latentrt_export.checkpoint.single.family import FAMILIES, family_of
from latentrt_export.checkpoint.single.pieces import without
from latentrt_export.checkpoint.single.text import text_config
from latentrt_export.checkpoint.single.unet import unet_config, unet_pieces
from latentrt_export.checkpoint.single.vae import vae_config
from latentrt_export.graphs.to_onnx import quiet
from tests.support.models.single_file import CLIP, TEXTS, open_clip, unet_name, vae_name

FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "xl"}
REFINER = {  # stabilityai/stable-diffusion-xl-refiner-1.0
    **PRESETS["sdxl"].networks["unet"][1],
    "attention_head_dim": [6, 12, 24, 24],
    "block_out_channels": [384, 768, 1536, 1536],
    "cross_attention_dim": 1280,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
}


SSD = {  # segmind/SSD-1B: fewer transformer layers, no attention in the middle
    "mid_block_type": "UNetMidBlock2D",
    "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1],
}
TINY = {  # segmind/tiny-sd: a level and the middle are left out
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 1,
    "mid_block_type": None,
}


def state(kind: str, config: Any) -> dict[str, torch.Tensor]:
    """Return a network's weights without numbers."""
    with torch.device("meta"), quiet():
        return dict(CLASSES[kind](config).state_dict())


@cache
def shapes_of(preset: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the single file of a published model."""
    family, tensors = FAMILY[preset], {}
    for name, (kind, config) in PRESETS[preset].networks.items():
        own = {key.removeprefix("text_model."): tensor for key, tensor in state(kind, config).items()}
        if name == "unet":
            tensors |= {f"model.diffusion_model.{unet_name(key, own, 2)}": tensor for key, tensor in own.items()}
        elif name == "vae":
            tensors |= {f"first_stage_model.{vae_name(key, 3)}": tensor for key, tensor in own.items()}
        elif prefix := TEXTS[family][name][3]:
            tensors |= {prefix + key: tensor for key, tensor in open_clip(own, cut=family == "sd2").items()}
        else:
            tensors |= {CLIP[family] + key: tensor for key, tensor in own.items()}
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize("preset", FAMILY)
def test_published_models_are_known_by_their_shapes(preset: str) -> None:
    shapes, networks = shapes_of(preset), PRESETS[preset].networks
    family, _ = family_of(shapes, None)
    assert family is FAMILIES[FAMILY[preset]]
    found = {
        "unet": unet_config(without("model.diffusion_model.", shapes), family.heads),
        "vae": vae_config(without("first_stage_model.", shapes)),
        **{name: text_config(text, shapes) for name, text in family.texts.items()},
    }
    assert found.keys() == networks.keys()
    with torch.device("meta"):
        ours, theirs = (
            {k: v for k, v in UNet2DConditionModel.from_config(config).config.items() if k != "_use_default_values"}
            for config in (networks["unet"][1] | found["unet"], networks["unet"][1])
        )
    assert ours == theirs
    for name in found.keys() - {"unet"}:
        assert networks[name][1] | found[name] == networks[name][1]


def test_the_refiner_is_known_by_its_shapes() -> None:
    own = state("UNet2DConditionModel", REFINER)
    shapes = {unet_name(name, own, 2): tuple(tensor.shape) for name, tensor in own.items()}
    found = unet_config(shapes, None)
    assert REFINER | found == REFINER
    assert {piece.source: piece.shape for piece in unet_pieces(found)} == shapes


@pytest.mark.parametrize(("preset", "change", "heads"), [("sdxl", SSD, None), ("sd15", TINY, 8)])
def test_distilled_models_are_known_by_their_shapes(preset: str, change: dict[str, Any], heads: int | None) -> None:
    config = PRESETS[preset].networks["unet"][1]
    own = state("UNet2DConditionModel", {**config, **change})
    names = {name: unet_name(name, own, change.get("layers_per_block", 2)) for name in own}
    found = unet_config({names[name]: tuple(tensor.shape) for name, tensor in own.items()}, heads)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    again = state("UNet2DConditionModel", {**config, **found})
    assert {name: tuple(tensor.shape) for name, tensor in again.items()} == wanted
    assert {piece.name: (piece.source, piece.shape) for piece in unet_pieces(found)} == {
        name: (names[name], shape) for name, shape in wanted.items()
    }
