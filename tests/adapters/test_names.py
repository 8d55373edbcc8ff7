"""The dictionary of names: LDM's layout, and nothing twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from latentrt.adapters.names import Module, dictionary, ldm_names
from latentrt_export.checkpoint.single.pieces import Config
from latentrt_export.checkpoint.single.unet import unet_pieces
from tests.adapters.conftest import base

SD: Config = {
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "cross_attention_dim": 768,
    "use_linear_projection": False,
    "transformer_layers_per_block": 1,
    "time_cond_proj_dim": 256,
}
XL: Config = SD | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
    "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "transformer_layers_per_block": [1, 2, 10],
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.mark.parametrize("config", [SD, XL], ids=["sd", "xl"])
def test_names_of_ldm_are_those_of_single_files(config: Config) -> None:
    pieces = unet_pieces(config)
    modules = {piece.name.rpartition(".")[0] for piece in pieces}
    assert ldm_names(modules) == {piece.name.rpartition(".")[0]: piece.source.rpartition(".")[0] for piece in pieces}
    names = dictionary({"unet": [piece.name for piece in pieces]})
    for prefix in ("lora_unet_", "unet.", "base_model.model."):  # each name is of one module, in both layouts
        assert {names[n].name for n in names if n.startswith(prefix)} == modules
    flat = [f"lora_unet_{layout.replace('.', '_')}" for pair in ldm_names(modules).items() for layout in pair]
    assert [names[name].name for name in flat[::2]] == [names[name].name for name in flat[1::2]]


def test_text_encoders_have_names_of_their_own(checkpoints: Callable[[str], Path]) -> None:
    own = {network: list(weights) for network, weights in base(checkpoints("sdxl")).items()}
    names = dictionary(own)
    layer = "encoder.layers.0.self_attn.q_proj"
    first, second = (names[f"lora_te{i}_text_model_{layer.replace('.', '_')}"] for i in (1, 2))
    assert (first.network, second.network) == ("text_encoder", "text_encoder_2")
    assert names[f"text_encoder_2.text_model.{layer}"] == second
    assert f"text_model.{layer}" not in names  # of which?
    alone = dictionary({"text_encoder": own["text_encoder"]})
    assert alone[f"base_model.model.text_model.{layer}"] == first
    assert names["lora_te2_text_projection"] == Module("text_encoder_2", "text_projection")
