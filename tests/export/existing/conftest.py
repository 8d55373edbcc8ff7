"""ONNX folders made on the spot, and their bundles; each once for all workers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import Summary, export_bundle
from tests.support.models import checkpoints, onnx_folders
from tests.support.traces import locked

# A VAE and a UNet of four levels: the only sizes that diffusers' ONNX pipeline of 2022 knows.
FOUR = {"block_out_channels": (16,) * 4, "norm_num_groups": 4, "down_block_types": ["DownEncoderBlock2D"] * 4}
DEEP_VAE = {**FOUR, "up_block_types": ["UpDecoderBlock2D"] * 4}


class Made(NamedTuple):
    """A checkpoint, its ONNX folder, and the bundle of that."""

    checkpoint: Path
    folder: Path
    bundle: Path


Make = Callable[[str], Made]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes a kind of ONNX folder, by its name in KINDS."""
    own = tmp_path_factory.getbasetemp()
    root = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "existing"
    root.mkdir(exist_ok=True)

    def make(name: str) -> Made:
        paths = Made(*(root / f"{name}-{part}" for part in Made._fields))
        with locked(root / f"{name}.lock"):
            if not paths.bundle.exists():
                KINDS[name](paths)
                export(paths.folder, paths.bundle)
        return paths

    return make


def export(folder: Path, bundle: Path) -> Summary:
    return export_bundle(folder, bundle)


def _sd(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sd(paths.checkpoint)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder)


def _old_sd(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sd(paths.checkpoint)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder, onnx_folders.OLD_OPTIMUM)


def _plain(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sd(paths.checkpoint, unet={"sample_size": 64}, vae=DEEP_VAE)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder, onnx_folders.PLAIN)


def _sd2(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sd2(paths.checkpoint)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder, onnx_folders.EXTERNAL)


def _sdxl(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sdxl(paths.checkpoint)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder)


def _inpainting(paths: Made) -> None:
    with quiet():
        index = {"_class_name": "StableDiffusionInpaintPipeline"}
        checkpoints.tiny_sd(paths.checkpoint, unet={"in_channels": 9}, index=index)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder)


def _half(paths: Made) -> None:
    with quiet():
        checkpoints.tiny_sd(paths.checkpoint, dtype=torch.float16)
    onnx_folders.make_onnx_folder(paths.checkpoint, paths.folder, onnx_folders.EXTERNAL, torch.float16)


KINDS: dict[str, Callable[[Made], None]] = {
    "sd": _sd,
    "old-sd": _old_sd,
    "plain": _plain,
    "sd2": _sd2,
    "sdxl": _sdxl,
    "inpainting": _inpainting,
    "half": _half,
}
