"""Checkpoints without bundles, as LoRAs are merged into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from latentrt.adapters.merge import Base, base_of
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.merge_bundle import merge_bundle
from tests.conftest import make_checkpoint
from tests.support.models.loras import EVERYWHERE, PRODUCTS, write_lora

Exported = Callable[[str], tuple[Path, Path]]
Library = Callable[[str], Path]
LAYOUTS = {"sd": "kohya", "sd2": "diffusers", "sdxl": "ldm"}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that makes, once each, a checkpoint: "sd", "sd2" or "sdxl"."""
    root = tmp_path_factory.mktemp("checkpoints")

    def make(name: str) -> Path:
        if not (root / name).exists():
            with quiet():
                make_checkpoint(name, root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def taking(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Return a function that makes, once each, a checkpoint and its bundle that takes LoRAs with each request."""
    root = tmp_path_factory.mktemp("taking")

    def make(name: str) -> tuple[Path, Path]:
        checkpoint, bundle = exported(name)
        if not (root / name).exists():
            merge_bundle(bundle, root / name, (), adapters=True)
        return checkpoint, root / name

    return make


@pytest.fixture(scope="session")
def library(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Library:
    """Return a function that makes a folder of LoRAs for a family: a and b of several ranks, "wide", "convs"."""
    root = tmp_path_factory.mktemp("library")

    def make(family: str) -> Path:
        folder, (checkpoint, _) = root / family, exported(family)
        if not folder.exists():
            folder.mkdir()
            write_lora(folder / "a.safetensors", checkpoint, LAYOUTS[family], PRODUCTS)
            write_lora(folder / "b.safetensors", checkpoint, "diffusers", ("to_k", "to_v", "v_proj"), ranks=(3, 5))
            write_lora(folder / "wide.safetensors", checkpoint, "diffusers", ("to_k",), ranks=(9,))
            write_lora(folder / "convs.safetensors", checkpoint, "diffusers", EVERYWHERE)
        return folder

    return make


def base(checkpoint: Path) -> Base:
    """Return a checkpoint's weights."""
    folders = [path for path in checkpoint.iterdir() if path.name.startswith(("unet", "text_encoder"))]
    files: Mapping[str, list[Path]] = {folder.name: sorted(folder.glob("*.safetensors")) for folder in folders}
    return base_of(files)
