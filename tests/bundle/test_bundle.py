"""Opening a bundle: its faults are found before anything is loaded, and named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import BundleError, HashMismatchError, LatentrtError, UnsafePathError, UnsafeWeightsError


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """Return a copy of the embedded bundle that a test may damage."""
    return Path(shutil.copytree(EMBEDDED, tmp_path / "bundle"))


def edit(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((bundle / "manifest.json").read_text())
    change(manifest)
    (bundle / "manifest.json").write_text(json.dumps(manifest))


def test_the_embedded_bundle_opens() -> None:
    bundle = Bundle.open()
    assert bundle.spec.denoiser == "unet"
    names = ["text_encoder", "unet_text", "unet", "unet_shallow", "vae_decoder", "vae_encoder"]
    assert list(bundle.spec.graphs()) == names
    assert all(bundle.path(name).is_file() for name in bundle.files)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no folder"):
        Bundle.open(tmp_path / "nothing")


def test_a_checkpoint_is_told_from_rubbish(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        Bundle.open(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(BundleError, match=r"diffusers checkpoint.*latentrt export"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_manifest_that_is_no_json_object(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=r"manifest\.json"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(schema=99),
        lambda m: m.pop("model"),
        lambda m: m.update(files=[]),
        lambda m: m["files"]["unet/model.onnx"].pop("sha256"),
        lambda m: m["files"].pop("unet/model.onnx"),
        lambda m: m["model"].update(family="flux"),
    ],
)
def test_a_manifest_with_a_wrong_part(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(bundle, change)
    with pytest.raises(BundleError, match="manifest"):
        Bundle.open(bundle)


def test_a_changed_byte_is_found(bundle: Path) -> None:
    weights = bundle / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(HashMismatchError, match="SHA-256"):
        Bundle.open(bundle)
    assert Bundle.open(bundle, check_hashes=False).root == bundle


def test_a_truncated_file_is_found_without_hashing(bundle: Path) -> None:
    os.truncate(bundle / "unet" / "diffusion_pytorch_model.safetensors", 1000)
    with pytest.raises(HashMismatchError, match="1000 bytes"):
        Bundle.open(bundle, check_hashes=False)


def test_a_missing_file_is_named(bundle: Path) -> None:
    (bundle / "vae" / "config.json").unlink()
    with pytest.raises(BundleError, match=r"vae/config\.json is missing"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "unet/../../secret", "C:\\secret", "a\\..\\b", "a\0b", ""]
)
def test_paths_never_leave_the_folder(bundle: Path, name: str) -> None:
    (bundle.parent / "secret").write_text("x")
    edit(bundle, lambda m: m["files"].update({name: {"sha256": "", "bytes": 1}}))
    with pytest.raises(UnsafePathError):
        Bundle.open(bundle)


def test_links_out_of_the_folder_are_refused(bundle: Path) -> None:
    outside = bundle.parent / "config.json"
    outside.write_bytes((bundle / "vae" / "config.json").read_bytes())
    (bundle / "vae" / "config.json").unlink()
    (bundle / "vae" / "config.json").symlink_to(outside)
    with pytest.raises(UnsafePathError, match="leads out of the bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer/tokenizer.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/model.onnx",
        "unet/model.fp16.onnx",
        "unet/model.cuda.onnx",
    ],
)
def test_nothing_is_read_that_is_not_listed(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].pop(name))
    with pytest.raises(BundleError, match="not listed"):
        Bundle.open(bundle)


def test_a_link_is_no_way_around_the_list(bundle: Path) -> None:
    edit(bundle, lambda m: m["files"].pop("tokenizer/tokenizer.json"))
    outside = shutil.move(bundle / "tokenizer" / "tokenizer.json", bundle.parent / "tokenizer.json")
    (bundle / "tokenizer" / "tokenizer.json").symlink_to(outside)
    with pytest.raises(BundleError, match="not listed"):
        Bundle.open(bundle)


def test_other_files_beside_the_model_are_none_of_its_business(bundle: Path) -> None:
    (bundle / "notes.txt").write_text("mine")
    (bundle / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")
    assert Bundle.open(bundle).root == bundle


@pytest.mark.parametrize("name", ["unet/diffusion_pytorch_model.bin", "model.CKPT", "x.pt", "x.pkl"])
def test_pickled_weights_are_refused(bundle: Path, name: str) -> None:
    edit(bundle, lambda m: m["files"].update({name: {"sha256": "", "bytes": 1}}))
    with pytest.raises(UnsafeWeightsError, match="safetensors"):
        Bundle.open(bundle)


def test_every_error_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LatentrtError) as caught:
        Bundle.open(tmp_path / "nothing")
    assert set(caught.value.parts) == {"found", "needed", "fix"}
    assert all(caught.value.parts.values())
    assert "latentrt export" in str(caught.value)
