"""A VAE alone as a bundle, and a VAE's folder in the place of a checkpoint's own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL

from latentrt.bundle.bundle import Bundle
from latentrt.errors import ExportError, UnsafeWeightsError
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import checkpoint_of, open_checkpoint
from latentrt_export.to_bundle import export_bundle
from tests.support.models.checkpoints import TINY_VAE, tiny_vae

Exported = Callable[[str], tuple[Path, Path]]


def change(folder: Path, **settings: Any) -> Path:
    """Change a VAE's config; return its folder."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))
    return folder


def test_a_vae_alone_is_a_bundle(exported: Exported, fast: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A KL one as it lies in a checkpoint, with the size that it was trained at; nothing of it is a model."""
    source = shutil.copytree(exported("sd")[0] / "vae", tmp_path / "my-vae")
    (source / "README.md").write_text("---\nlicense: mit\n---\n")
    fast.setattr("latentrt_export.golden.golden_runs", lambda root, spec: pytest.fail("it draws nothing"))
    export_bundle(source, tmp_path / "bundle", golden=lambda root, spec: pytest.fail("it draws nothing"))
    opened = Bundle.open(tmp_path / "bundle")
    assert (opened.spec.id, opened.spec.license, opened.spec.draws) == ("my-vae", "mit", False)
    latents = opened.spec.latents
    assert (latents.channels, latents.factor, latents.scale, latents.height) == (4, 2, 0.18215, 8)
    assert {"vae/config.json", "vae/diffusion_pytorch_model.safetensors", "README.md"} <= set(opened.files)
    assert not {"model_index.json", "config.json"} & set(opened.files)
    AutoencoderKL.from_pretrained(tmp_path / "bundle" / "vae")


def test_a_folder_takes_the_place_of_a_checkpoints_vae(checkpoint: Path, tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "tiny", **TINY_VAE)
    with checkpoint_of(checkpoint, choices=Choices(vae=vae)) as opened:
        assert opened.index["vae"] == ["diffusers", "AutoencoderTiny"]
        assert opened.configs["vae"]["encoder_block_out_channels"] == [16, 16]
        own = [path for name, path in opened.files.items() if name.startswith("vae/")]
        assert {path.parent for path in own} == {vae}
        assert opened.notes == ("VAE of tiny",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"latent_channels": 16}, "16 latent channels, 2 pixels a side.*4 channels, 2 pixels"),
        ({"_class_name": "VQModel"}, "a VAE of the class 'VQModel'.*AutoencoderKL or AutoencoderTiny"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor 4"),
        ({"decoder_block_out_channels": [16] * 3}, "decoder_block_out_channels"),
        ({"encoder_block_out_channels": "wide"}, "encoder_block_out_channels 'wide'"),
    ],
)
def test_vaes_that_do_not_fit_are_refused(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    vae = change(tiny_vae(tmp_path / "tiny", **TINY_VAE), **settings)
    with pytest.raises(ExportError, match=words), checkpoint_of(checkpoint, choices=Choices(vae=vae)):
        pass


def test_folders_that_are_no_vae(checkpoint: Path, tmp_path: Path) -> None:
    vae = tiny_vae(tmp_path / "tiny", **TINY_VAE)
    for source, folder, words in (
        (checkpoint, tmp_path, "has no config.json"),
        (checkpoint, checkpoint / "unet", "a VAE of the class 'UNet2DConditionModel'"),
        (vae, vae, "--vae with tiny, which is no model"),
    ):
        with pytest.raises(ExportError, match=words), checkpoint_of(source, choices=Choices(vae=folder)):
            pass
    (vae / "diffusion_pytorch_model.safetensors").rename(vae / "diffusion_pytorch_model.bin")
    with pytest.raises(UnsafeWeightsError, match="pickled"):
        open_checkpoint(vae)
