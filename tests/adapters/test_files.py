"""What is refused of LoRA files, and how they are given."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from latentrt.adapters.given import Lora, loras_of, parsed
from latentrt.adapters.merge import Weight, base_of, merge_of
from latentrt.bundle.tensors import as_stored
from latentrt.errors import AdapterError, UnsafeWeightsError
from tests.adapters.conftest import base
from tests.support.models.loras import LINEAR, write_lora

Checkpoints = Callable[[str], Path]
DOWN, UP = torch.ones(2, 4), torch.ones(6, 2)
LOW_RANK = {"lora_unet_conv_in.lora_down.weight": DOWN, "lora_unet_conv_in.lora_up.weight": UP}


@pytest.fixture
def linear(tmp_path: Path) -> Path:
    save_file({"conv_in.weight": torch.zeros(6, 4, 1, 1)}, tmp_path / "unet.safetensors")
    return tmp_path / "unet.safetensors"


def merged(unet: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> np.ndarray:
    path = unet.with_name("lora.safetensors")
    save_file(tensors, path, metadata)
    return merge_of(base_of({"unet": [unet]}), [Lora(path)]).value(Weight("unet", "conv_in.weight"))


def test_every_key_without_a_place_is_listed(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = write_lora(tmp_path / "lora.safetensors", checkpoints("sd"), "kohya")
    strange = {"lora_unet_nothing.lora_up.weight": UP, "lora_unet_mid_block_attentions_0_proj_in.oft_blocks": DOWN}
    save_file(load_file(path) | strange, path)
    own = base(checkpoints("sd"))
    with pytest.raises(AdapterError, match=f"has 2 of .*{', '.join(sorted(strange))}.*--allow-unmatched"):
        merge_of(own, [Lora(path)])
    merge = merge_of(own, [Lora(path)], allow_unmatched=True)
    assert merge.notes == (f"lora.safetensors: 2 keys have no place: {', '.join(sorted(strange))}",)
    assert merge.added


@pytest.mark.parametrize(("family", "other", "layout"), [("sd", "sdxl", "ldm"), ("sdxl", "sd", "kohya")])
def test_another_family_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, family: str, other: str, layout: str
) -> None:
    path = write_lora(tmp_path / "lora.safetensors", checkpoints(other), layout)
    needed = {"sd": 32, "sdxl": 80}
    message = f"made for texts of {needed[other]} numbers. Needed: a LoRA for texts of {needed[family]} numbers"
    with pytest.raises(AdapterError, match=message):
        merge_of(base(checkpoints(family)), [Lora(path)], allow_unmatched=True)


def test_a_file_without_any_place_is_refused(checkpoints: Checkpoints, tmp_path: Path) -> None:
    path = tmp_path / "flux.safetensors"
    save_file({"lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": UP}, path)
    with pytest.raises(AdapterError, match=r"1 of 1 keys without a place.*double_blocks"):
        merge_of(base(checkpoints("sd")), [Lora(path)], allow_unmatched=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_up": torch.ones(8, 2)}, r"changes the unet's conv_in as 8 x 4. Needed: 6 x 4"),
        ({"lora_down": torch.ones(2, 5)}, r"as 6 x 5. Needed: 6 x 4"),
        ({"lora_down": torch.ones(3, 4)}, r"down 3x4, up 6x2 for conv_in. Needed: .* of one rank"),
        ({"lora_up": None}, r"has down for conv_in. Needed: all parts"),
        ({"hada_w1_a": torch.ones(6, 2)}, r"has down, hada_w1_a, up for conv_in.*of one kind"),
        ({"lora_B": torch.ones(6, 2)}, r"has both .*lora_(B|up).* and .*lora_(B|up)"),
        ({"lora_up": torch.full((6, 2), torch.inf)}, r"makes conv_in.weight too large for F32"),
        ({"lora_up": torch.ones(6, 2, dtype=torch.float8_e4m3fn)}, r"is F8_E4M3. Needed: one of"),
    ],
)
def test_parts_that_do_not_fit(linear: Path, changes: dict[str, torch.Tensor | None], message: str) -> None:
    parts = {"lora_down": DOWN, "lora_up": UP} | changes
    ends = {part: part if part.startswith("hada") else f"{part}.weight" for part in parts}
    tensors = {f"lora_unet_conv_in.{ends[part]}": tensor for part, tensor in parts.items() if tensor is not None}
    with pytest.raises(AdapterError, match=message):
        merged(linear, tensors)


def test_alphas(linear: Path) -> None:
    key, header = "lora_unet_conv_in.alpha", "lora_adapter_metadata"
    assert merged(linear, LOW_RANK).max() == 2
    assert merged(linear, LOW_RANK | {key: torch.tensor(0.0)}).max() == 2  # as without
    assert merged(linear, LOW_RANK | {key: torch.tensor(3.0)}).max() == 3
    assert (
        merged(linear, LOW_RANK, {header: json.dumps({"lora_alpha": 1, "alpha_pattern": {"^conv_in": 8}})}).max() == 8
    )
    assert merged(linear, LOW_RANK, {header: json.dumps({"text_encoder.lora_alpha": 8})}).max() == 2
    for value, message in (("[", "cannot be read"), ('{"alpha_pattern": {"(a+)+": 1}}', "names of modules")):
        with pytest.raises(AdapterError, match=message):
            merged(linear, LOW_RANK, {header: value})


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("a.pt", b"", "needed.*can run code|can run code"),
        ("b.safetensors", b"PK\x03\x04" * 9, "pickled"),
        ("c.safetensors", b"\x08", "is cut"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((AdapterError, UnsafeWeightsError), match=message):
            merge_of({}, [Lora(tmp_path / name)])
    with pytest.raises(AdapterError, match="there is no file"):
        merge_of({}, [Lora(tmp_path / "none.safetensors")])


def test_how_they_are_given(tmp_path: Path) -> None:
    assert parsed("a.safetensors") == Lora(Path("a.safetensors"))
    assert parsed("a.safetensors:0.8") == Lora(Path("a.safetensors"), 0.8, 0.8)
    assert parsed("x:y/a.safetensors:0.8:-1") == Lora(Path("x:y/a.safetensors"), 0.8, -1)
    (tmp_path / "a:0.5").touch()
    assert parsed(f"{tmp_path}/a:0.5") == Lora(tmp_path / "a:0.5")
    for wrong in ("a.safetensors:strong", ":0.5", "a.safetensors:", "a.safetensors:nan"):
        with pytest.raises(AdapterError):
            parsed(wrong)
    own = Lora(Path("a"), 0.8, 0.3)
    assert loras_of([own, "a:0.8:0.3", Path("a")]) == (own, own, Lora(Path("a")))
    assert loras_of({"a": 0.8, Path("b"): (1.0, 0.0)}) == (Lora(Path("a"), 0.8, 0.8), Lora(Path("b"), 1.0, 0.0))
    assert [str(lora) for lora in loras_of(["x/a:0.8", "a:1:0"])] == ["a:0.8", "a:1:0"]


def test_numbers_are_rounded_once(tmp_path: Path, checkpoints: Checkpoints) -> None:
    array = torch.randn(4096) * 10.0 ** torch.arange(-20, 20).repeat(103)[:4096]
    known = {"BF16": array.bfloat16().view(torch.int16), "F16": array.half().view(torch.int16)}
    for dtype, expected in known.items():
        np.testing.assert_array_equal(as_stored(array.numpy(), dtype).view(np.int16), expected.numpy())
    path = write_lora(tmp_path / "lora.safetensors", checkpoints("sd"), "kohya", LINEAR)
    for dtype in (torch.bfloat16, torch.float16):
        half = tmp_path / f"{re.sub('.*[.]', '', str(dtype))}.safetensors"
        weights = load_file(checkpoints("sd") / "unet" / "diffusion_pytorch_model.safetensors")
        save_file({name: weight.to(dtype) for name, weight in weights.items()}, half)
        save_file({name: weight.to(dtype).float() for name, weight in weights.items()}, tmp_path / "wide.safetensors")
        lora = Lora(path, 1.0, 0.0)
        texts = {name: file for name, file in base(checkpoints("sd")).items() if name != "unet"}
        bases = ({**texts, **base_of({"unet": [unet]})} for unet in (half, tmp_path / "wide.safetensors"))
        narrow, wide = (merge_of(own, [lora]) for own in bases)
        for weight in narrow.added:
            exact = torch.from_numpy(wide.value(weight)).to(dtype)
            np.testing.assert_array_equal(narrow.value(weight).view(np.int16), exact.view(torch.int16).numpy())
