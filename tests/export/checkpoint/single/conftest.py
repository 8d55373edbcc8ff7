"""Small single files of every family, made once for a worker, beside the diffusers folders of the same models."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from latentrt_export.graphs.to_onnx import quiet
from tests.support.models.single_file import Tensors, networks_of, single_tensors, write_reference, write_single


class Made(NamedTuple):
    """A single file, its tensors, and the diffusers folder of the same model."""

    file: Path
    tensors: Tensors
    folder: Path


Make = Callable[..., Made]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that makes, once each, a family's file: made("sd1"), made("sd1", 9) for inpainting."""

    @cache
    def make(family: str, channels: int = 4, distilled: bool = False, guidance: int | None = None) -> Made:
        root = tmp_path_factory.mktemp(f"{family}-{channels}")
        scheduler = {"_class_name": "LCMScheduler"} if guidance else {}
        with quiet():
            networks = networks_of(family, channels=channels, distilled=distilled, guidance=guidance)
            folder = write_reference(family, root / "folder", networks, **scheduler)
        tensors = single_tensors(family, networks)
        return Made(write_single(root / f"{family}.safetensors", tensors), tensors, folder)

    return make
