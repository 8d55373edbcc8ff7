"""Files of IP-Adapters: what is read of them, and what is refused before anything is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from latentrt.bundle.bundle import Bundle
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.add_ons.ip_adapter import read_ip_adapter
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import checkpoint_of

Exported = Callable[[str], tuple[Path, Path]]
Weights = dict[str, np.ndarray]


def opened(file: Path, choices: Choices | None = None) -> None:
    with checkpoint_of(file, choices=choices or Choices()):
        pass


@pytest.mark.parametrize("kind", ["base", "plus", "full"])
def test_a_bundle_is_the_files_and_two_graphs(exported: Exported, kind: str) -> None:
    """No weight is written twice, in float16 neither."""
    file, folder = exported(f"ip-sd-{kind}")
    bundle, own = Bundle.open(folder), read_ip_adapter(file)
    assert bundle.spec.kind == "ip_adapter"
    assert [(name, one.role) for name, one in bundle.spec.networks.items()] == [
        ("image_encoder", "hint"),
        ("ip_adapter", "conditioner"),
    ]
    assert (folder / "ip_adapter" / "model.safetensors").read_bytes() == file.read_bytes()
    assert not list(folder.rglob("*.extra.safetensors"))
    keys = bundle.spec.networks["ip_adapter"].outputs[0]
    tokens = {"base": 4, "plus": 16, "full": 17}[kind]
    assert (own.kind, keys.name, keys.shape) == (kind, "keys.0", ("batch", tokens, own.channels[0]))


def copied(exported: Exported, tmp_path: Path, change: Callable[[Weights], None], kind: str = "base") -> Path:
    """Return a file with changed weights, the image encoder beside it."""
    file = exported(f"ip-sd-{kind}")[0]
    weights = load_file(file)
    change(weights)
    save_file(weights, tmp_path / "changed.safetensors")
    (tmp_path / "image_encoder").symlink_to(file.parent / "image_encoder")
    return tmp_path / "changed.safetensors"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("image_proj.perceiver_resampler.proj_in.weight", "such as FaceID. Needed: one of base, plus, full"),
        ("ip_adapter.1.to_k_lora.down.weight", r"has ip_adapter.1.to_k_lora.down.weight: \[1, 1\]. Needed: no such"),
    ],
)
def test_other_kinds_are_refused(exported: Exported, tmp_path: Path, name: str, words: str) -> None:
    def change(weights: Weights) -> None:
        weights[name] = np.zeros((1, 1), np.float32)
        if "resampler" in name:
            del weights["image_proj.proj.weight"]

    with pytest.raises(ExportError, match=words):
        opened(copied(exported, tmp_path, change))


def test_weights_that_do_not_fit_are_refused(exported: Exported, tmp_path: Path) -> None:
    def short(weights: Weights) -> None:
        weights["image_proj.layers.1.1.3.weight"] = weights["image_proj.layers.1.1.3.weight"][:1]

    def without(weights: Weights) -> None:
        del weights["ip_adapter.3.to_v_ip.weight"]

    (tmp_path / "plus").mkdir()
    with pytest.raises(ExportError, match=r"layers.1.1.3.weight: \[1, 128\]. Needed: \[32, 128\]"):
        opened(copied(exported, tmp_path / "plus", short, "plus"))
    with pytest.raises(ExportError, match=r"ip_adapter.\d.to_._ip.weight"):
        opened(copied(exported, tmp_path, without))


def test_the_image_encoder_must_be_its_own(exported: Exported, tmp_path: Path) -> None:
    file = copied(exported, tmp_path, lambda weights: None)
    encoder = tmp_path / "image_encoder"
    config = json.loads((encoder / "config.json").read_text())
    encoder.unlink()
    with pytest.raises(ExportError, match=r"no image encoder in .*--image-encoder FOLDER"):
        opened(file)
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "projection_dim": 24}))
    with pytest.raises(ExportError, match=r"projection_dim 24, and changed.safetensors reads 20"):
        opened(file, Choices(image_encoder=other))
    (other / "config.json").write_text(json.dumps(config))
    (other / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsafeWeightsError, match="pickled"):
        opened(file, Choices(image_encoder=other))


def test_options_that_have_no_place(exported: Exported, checkpoint: Path, tmp_path: Path) -> None:
    file = exported("ip-sd-base")[0]
    with pytest.raises(ExportError, match="--ema with the IP-Adapter"):
        opened(file, Choices(ema=True))
    with pytest.raises(ExportError, match=r"--image-encoder with .*Needed: an IP-Adapter"):
        opened(checkpoint, Choices(image_encoder=tmp_path))
    (tmp_path / "ip-adapter.bin").write_bytes(b"")
    with pytest.raises(UnsafeWeightsError, match="pickled weights"):
        opened(tmp_path / "ip-adapter.bin")
