"""LyCORIS' kinds against its own library."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from lycoris.modules.norms import NormModule
from safetensors.torch import save_file
from torch import nn

from latentrt.adapters.given import Lora
from latentrt.adapters.merge import Weight, base_of, merge_of

MODULES = {
    "lora_unet_conv_in": nn.Conv2d(12, 18, 3),
    "lora_unet_mid_block_attentions_0_proj_in": nn.Conv2d(18, 24, 1),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": nn.Linear(24, 30),
}
NAMES = ("conv_in", "mid_block.attentions.0.proj_in", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
KINDS = {
    "locon": (LoConModule, {}),
    "locon-tucker": (LoConModule, {"use_tucker": True}),
    "loha": (LohaModule, {}),
    "loha-tucker": (LohaModule, {"use_tucker": True}),
    "lokr": (LokrModule, {}),
    "lokr-factors": (LokrModule, {"decompose_both": True, "factor": 3, "lora_dim": 1}),
    "lokr-tucker": (LokrModule, {"use_tucker": True, "lora_dim": 1}),
    "lokr-whole": (LokrModule, {"full_matrix": True}),
    "rslora": (LoConModule, {"rs_lora": True}),
    "dora": (LoConModule, {"weight_decompose": True}),
    "dora-in": (LoConModule, {"weight_decompose": True, "wd_on_out": False}),
    "doha": (LohaModule, {"weight_decompose": True}),
    "dokr": (LokrModule, {"weight_decompose": True, "wd_on_out": False}),
}


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("unet") / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    pairs = zip(NAMES, MODULES.values(), strict=True)
    save_file({f"{name}.{end}": w.detach() for name, m in pairs for end, w in m.state_dict().items()}, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("strength", [1.0, 0.4])
@torch.no_grad()
def test_equal_to_lycoris(unet: Path, tmp_path: Path, kind: str, strength: float) -> None:
    made, options = KINDS[kind]
    torch.manual_seed(1)
    tensors, expected = {}, {}
    for (key, module), name in zip(MODULES.items(), NAMES, strict=True):
        lora = made(key, module, **{"lora_dim": 4, "alpha": 3, **options})
        for parameter in lora.parameters():
            parameter.copy_(torch.rand_like(parameter) + 0.1)
        tensors |= {f"{key}.{part}": tensor.contiguous() for part, tensor in lora.custom_state_dict().items()}
        expected[name] = whole(lora, module.weight, strength)
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, tmp_path / "lora.safetensors")
    merge = merge_of(base_of({"unet": [unet]}), [Lora(tmp_path / "lora.safetensors", strength)])
    assert {weight.name for weight in merge.added} == {f"{name}.weight" for name in NAMES}
    for name, weight in expected.items():
        ours = merge.value(Weight("unet", f"{name}.weight"))
        np.testing.assert_allclose(ours, weight.numpy(), rtol=2e-5, atol=2e-5)


def whole(lora: nn.Module, weight: torch.Tensor, strength: float) -> torch.Tensor:
    """Return the weight that the library computes with, as its forward pass makes it.

    Its `get_merged_weight` multiplies with alpha/r twice (LoHa, LoKr: 4.1). At a strength other than 1 its DoRA does
    not lead to the plain weight; the way there is taken linearly, as A1111 and ComfyUI do.
    """
    change = lora.make_weight() * lora.scale if isinstance(lora, LoConModule) else lora.get_weight(lora.shape)
    if lora.wd:
        change = lora.apply_weight_decompose(weight + change) - weight
    return weight + strength * change


@torch.no_grad()
def test_differences_of_weights_norms_and_biases(tmp_path: Path) -> None:
    linear, norm = nn.Linear(4, 6), nn.GroupNorm(2, 6)
    own = {"conv_in": linear, "conv_norm_out": norm}
    stored = {f"{name}.{end}": weight.detach() for name, m in own.items() for end, weight in m.state_dict().items()}
    save_file(stored, tmp_path / "unet.safetensors")
    change = NormModule("lora_unet_conv_norm_out", norm)
    parts = {"diff": torch.randn(6, 4), "diff_b": torch.randn(6)}
    change.w_norm.normal_(), change.b_norm.normal_()
    tensors = {f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()}
    tensors |= {
        "lora_unet_conv_norm_out.w_norm": change.w_norm.data,
        "lora_unet_conv_norm_out.b_norm": change.b_norm.data,
    }
    save_file(tensors, tmp_path / "full.safetensors")
    merge = merge_of(base_of({"unet": [tmp_path / "unet.safetensors"]}), [Lora(tmp_path / "full.safetensors", 0.5)])
    normed = change.get_merged_weight(0.5)
    for name, expected in (
        ("conv_in.weight", linear.weight + 0.5 * parts["diff"]),
        ("conv_in.bias", linear.bias + 0.5 * parts["diff_b"]),
        ("conv_norm_out.weight", normed[0]),
        ("conv_norm_out.bias", normed[1]),
    ):
        np.testing.assert_allclose(merge.value(Weight("unet", name)), expected.numpy(), rtol=1e-6, atol=1e-6)
