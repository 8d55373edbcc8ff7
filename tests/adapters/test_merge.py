"""Merged weights against diffusers and peft, as a user loads and fuses them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from latentrt.adapters.given import Lora
from latentrt.adapters.merge import Weight, merge_of
from latentrt_export.graphs.to_onnx import quiet
from tests.adapters.conftest import base
from tests.support.models.loras import ATTENTION, EVERYWHERE, LINEAR, without_alphas, write_lora

Checkpoints = Callable[[str], Path]
ABSENT = {"safety_checker": None, "feature_extractor": None}


def merged(checkpoint: Path, *loras: Lora) -> dict[Weight, np.ndarray]:
    """Return all weights of a checkpoint's networks, as float32."""
    own = base(checkpoint)
    merge = merge_of(own, loras)
    weights = {Weight(n, name): file.floats(name) for n, all_ in own.items() for name, file in all_.items()}
    return weights | {weight: merge.value(weight).astype(np.float32) for weight in merge.added}


def fused(checkpoint: Path, *loras: Lora, several_alphas: bool) -> Mapping[str, Mapping[str, torch.Tensor]]:
    """Return diffusers' weights by network, in float32."""
    variant = {"variant": "fp16"} if checkpoint.name == "sd2" else {}
    absent = {} if checkpoint.name == "sdxl" else ABSENT
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(checkpoint, use_safetensors=True, **absent, **variant)
        for lora in loras:
            path = without_alphas(lora.path) if several_alphas else lora.path
            pipe.load_lora_weights(path.parent, weight_name=path.name)
            pipe.fuse_lora(lora_scale=lora.unet)
            pipe.unload_lora_weights()
    return {
        name: getattr(pipe, name).state_dict()
        for name in ("unet", "text_encoder", "text_encoder_2")
        if hasattr(pipe, name)
    }


def check(checkpoint: Path, *loras: Lora, several_alphas: bool = False) -> None:
    ours, before = merged(checkpoint, *loras), merged(checkpoint)
    theirs, half = fused(checkpoint, *loras, several_alphas=several_alphas), checkpoint.name == "sd2"
    changed = 0
    for (network, name), weight in ours.items():
        known = theirs[network]
        other = known[name] if name in known else known[name.removeprefix("text_model.")]
        tolerance = {"rtol": 1e-3, "atol": 1e-3} if half else {"rtol": 1e-5, "atol": 2e-6}
        np.testing.assert_allclose(weight, other.float().numpy(), err_msg=name, **tolerance)
        changed += not np.array_equal(weight, before[network, name])
    assert changed >= 10


@pytest.mark.parametrize(
    ("family", "layout", "ends"),
    [
        ("sd", "old", (*ATTENTION, "self_attn.out_proj")),
        ("sd", "diffusers", EVERYWHERE),
        ("sd2", "kohya", EVERYWHERE),
        ("sdxl", "kohya", LINEAR),
        ("sdxl", "diffusers", LINEAR),
    ],
)
def test_equal_to_diffusers(
    checkpoints: Checkpoints, tmp_path: Path, family: str, layout: str, ends: tuple[str, ...]
) -> None:
    checkpoint = checkpoints(family)
    path = write_lora(tmp_path / "lora.safetensors", checkpoint, layout, ends)
    check(checkpoint, Lora(path, 0.7, 0.7))


@pytest.mark.parametrize(("family", "layout"), [("sd", "kohya"), ("sdxl", "ldm")])
def test_several_alphas_and_several_files(checkpoints: Checkpoints, tmp_path: Path, family: str, layout: str) -> None:
    checkpoint = checkpoints(family)
    first = write_lora(tmp_path / "a.safetensors", checkpoint, layout, EVERYWHERE, alphas=(1.0, 3.0, 0.5))
    second = write_lora(tmp_path / "b.safetensors", checkpoint, layout, LINEAR, ranks=(1, 3))
    check(checkpoint, Lora(first, 0.7, 0.7), Lora(second, -1.5, -1.5), several_alphas=True)


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["alphas", "rslora", "dora"])
def test_settings_of_peft_in_the_header(checkpoints: Checkpoints, tmp_path: Path, settings: dict[str, Any]) -> None:
    checkpoint = checkpoints("sd")
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(checkpoint, use_safetensors=True, **ABSENT)
    torch.manual_seed(5)
    known = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": [*LINEAR, "conv1"]}
    patterns = {"attentions.0.transformer_blocks.0.attn1.to_q": 2, "mid_block.attentions.0.proj_in": 5}
    unet = pipe.unet
    unet.add_adapter(LoraConfig(rank_pattern=patterns, alpha_pattern=patterns | {"conv1": 7}, **known, **settings))
    config = {f"unet.{key}": value for key, value in unet.peft_config["default"].to_dict().items()}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    weights = get_peft_model_state_dict(unet)
    if "use_dora" in settings:  # as trained: norms that are not the weights' own
        weights = {key: w * 1.3 if "magnitude" in key else w for key, w in weights.items()}
    tensors = {f"unet.{key}": weight.contiguous() for key, weight in weights.items()}
    path = tmp_path / "peft.safetensors"
    save_file(tensors, path, {"format": "pt", "lora_adapter_metadata": json.dumps(plain)})
    check(checkpoint, Lora(path, 0.6, 0.6))


def test_a_folder_of_peft(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("sd")
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    modules = ["to_q", "conv1"]
    model = get_peft_model(unet, LoraConfig(r=3, lora_alpha=5, init_lora_weights=False, target_modules=modules))
    model.save_pretrained(tmp_path / "adapter")
    ours = merged(checkpoint, Lora(tmp_path / "adapter"))
    for name, weight in model.merge_and_unload().state_dict().items():
        np.testing.assert_allclose(ours[Weight("unet", name)], weight.numpy(), rtol=1e-5, atol=2e-6)


def test_strengths_apart_and_none(checkpoints: Checkpoints, tmp_path: Path) -> None:
    checkpoint = checkpoints("sdxl")
    path = write_lora(tmp_path / "lora.safetensors", checkpoint, "ldm")
    both, unet, text = (merged(checkpoint, Lora(path, *s)) for s in ((0.5, 2.0), (0.5, 0.0), (0.0, 2.0)))
    before = merged(checkpoint)
    for weight, array in both.items():
        own, other = (unet, text) if weight.network == "unet" else (text, unet)
        np.testing.assert_array_equal(array, own[weight])
        np.testing.assert_array_equal(before[weight], other[weight])
    assert merge_of(base(checkpoint), [Lora(path, 0.0, 0.0)]).added == {}
