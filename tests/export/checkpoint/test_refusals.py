"""Weights and configs that cannot be used are refused by name, before the first network is exported."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file, save_file

from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export import to_bundle
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.to_bundle import export_bundle
from tests.export.checkpoint.test_weights import PT, weights_of


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 492265880\n")


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def cut_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def lengthened(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"more")


def with_header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        new = json.dumps(change(header) or header).encode()
        path.write_bytes(len(new).to_bytes(8, "little") + new + data[8 + length :])

    return apply


def html(path: Path) -> None:
    path.write_text("<!DOCTYPE html><html>" + "Not Found " * 100)


def first_of(header: dict[str, Any]) -> Any:
    return next(entry for name, entry in header.items() if name != "__metadata__")


def renamed(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: save_file({change(name): tensor for name, tensor in load_file(path).items()}, path, PT)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (pointer, "is a Git LFS pointer.*git lfs pull"),
        (emptied, "is empty"),
        (cut, "is cut: its header tells of"),
        (cut_in_header, "is cut: its header has"),
        (lengthened, "is not whole: its header tells of"),
        (html, "is a web page"),
        (lambda path: path.write_bytes((5).to_bytes(8, "little") + b"hello"), "has a header that is no JSON"),
        (with_header(lambda header: [1]), "has a header that is no JSON object"),
        (with_header(lambda header: first_of(header).update(data_offsets=[0])), "a damaged header at"),
        (with_header(lambda header: first_of(header).update(shape="wide")), "a damaged header at"),
        (with_header(lambda header: first_of(header).update(shape=[3])), "a damaged header at"),
        (with_header(lambda header: first_of(header).update(dtype="F8", data_offsets=[2**62, 2**63])), "begin where"),
        (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
        (renamed(lambda name: name.replace(".weight", ".base_layer.weight")), "LoRA"),
        (renamed(lambda name: f"{name}.lora_A.default_0.weight"), "LoRA.*fuse_lora"),
        (renamed(lambda name: f"{name}.processor.to_q_lora.down.weight"), "LoRA"),
        (
            lambda path: path.rename(path.with_name("pytorch_model.safetensors")),
            r"pytorch_model\.safetensors has a name",
        ),
    ],
)
@pytest.mark.parametrize("part", ["text_encoder", "unet", "vae"])
def test_weights_that_cannot_be_used_are_refused_when_opened(
    checkpoint: Path, part: str, damage: Callable[[Path], None], words: str
) -> None:
    damage(weights_of(checkpoint / part))
    with pytest.raises(ExportError, match=f"{part}/.*{words}"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["config.json", "../tokenizer/merges.txt", "../tokenizer/vocab.json"])
def test_pointers_in_place_of_texts_are_named(checkpoint: Path, name: str) -> None:
    path = (checkpoint / "text_encoder" / name).resolve()
    pointer(path)
    with pytest.raises(ExportError, match=rf"{path.parent.name}/{path.name} is a Git LFS pointer"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize(
    ("places", "words"),
    [
        ({"a": "../vae/diffusion_pytorch_model.safetensors"}, r"the shard '\.\./vae"),
        ({"a": "none.safetensors"}, r"the shard 'none\.safetensors'"),
        ({"a": ["list"]}, r"the shard \['list'\]"),
        (["a"], "has no weight_map"),
        ({}, "has no weight_map"),
        (None, "has no weight_map"),
    ],
)
def test_a_damaged_index_is_named(checkpoint: Path, places: Any, words: str) -> None:
    weights_of(checkpoint / "unet").unlink()
    index = checkpoint / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ExportError, match=words):
        open_checkpoint(checkpoint)


def test_pickled_weights_are_refused_unless_safetensors_are_beside_them(checkpoint: Path) -> None:
    weights = weights_of(checkpoint / "unet")
    pickle = weights.with_suffix(".bin")
    pickle.write_bytes(b"pickle")
    assert pickle not in open_checkpoint(checkpoint).files.values()
    weights.unlink()
    with pytest.raises(UnsafeWeightsError, match=r"unet/diffusion_pytorch_model\.bin"):
        open_checkpoint(checkpoint)
    pickle.unlink()
    with pytest.raises(ExportError, match="no weights"):
        open_checkpoint(checkpoint)
    shutil.rmtree(weights.parent)
    with pytest.raises(ExportError, match="has no folder unet"):
        open_checkpoint(checkpoint)


@pytest.fixture
def before_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a network's export begins."""

    def reached(*arguments: Any) -> Any:
        pytest.fail("an export began")

    monkeypatch.setattr(to_bundle, "_export_network", reached)


def without(name: str) -> Callable[[Path], None]:
    return lambda path: save_file({key: one for key, one in load_file(path).items() if key != name}, path, PT)


def reshaped(path: Path) -> None:
    tensors = load_file(path)
    tensors["decoder.conv_in.weight"] = tensors["decoder.conv_in.weight"][:, :2].copy()
    save_file(tensors, path, PT)


def as_convolutions(path: Path) -> None:
    """LDM's own attention weights, which diffusers' converters make matrices of."""
    tensors = load_file(path)
    names = [name for name in tensors if ".attentions." in name and tensors[name].ndim == 2]
    save_file({**tensors, **{name: tensors[name][..., None, None] for name in names}}, path, PT)


@pytest.mark.usefixtures("before_export")
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (without("decoder.conv_in.weight"), r"vae has no weights for decoder\.conv_in\.weight \(1 are missing\)"),
        (reshaped, r"vae has decoder\.conv_in\.weight of the shape \[16, 2, 3, 3\]"),
        (as_convolutions, r"vae has .*attentions\.0\..* of the shape \[16, 16, 1, 1\]"),
    ],
)
def test_weights_that_do_not_fill_a_network_are_refused_before_the_first_export(
    checkpoint: Path, tmp_path: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(weights_of(checkpoint / "vae"))
    with pytest.raises(ExportError, match=words):
        export_bundle(checkpoint, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.usefixtures("before_export")
@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("vae/config.json", {"act_fn": ["silu"]}, "vae"),
        ("vae/config.json", {"norm_num_groups": "two"}, "norm_num_groups 'two'"),
        ("vae/config.json", {"down_block_types": ["NoBlock"]}, "NoBlock"),
        ("unet/config.json", {"norm_eps": "small"}, "norm_eps 'small'"),
        ("unet/config.json", {"block_out_channels": [16, 48]}, "unet"),
        ("text_encoder/config.json", {"hidden_size": "wide"}, "text_encoder"),
        ("text_encoder/config.json", {"num_hidden_layers": 3}, "text_encoder has no weights for"),
    ],
)
def test_configs_that_make_no_network_are_refused_before_the_first_export(
    checkpoint: Path, tmp_path: Path, file: str, change: dict[str, Any], words: str
) -> None:
    path = checkpoint / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ExportError, match=words):
        export_bundle(checkpoint, tmp_path / "bundle")
