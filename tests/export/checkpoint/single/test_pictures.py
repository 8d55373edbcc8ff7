"""Whole pictures of bundles made from single files against diffusers' pipelines of the same files."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from latentrt import Engine
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import read_json
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.verify import verify
from tests.export.checkpoint.single.conftest import Make
from tests.support.models.single_file import write_single

PROMPT, NEGATIVE = "a photo of a cat", "a dog"
PREDICTIONS = {"sd2": "v_prediction"}
PSNR_BOUND = 50.0
SIZE = {"height": 32, "width": 48}
KINDS = [("sd2", 4, False), ("sd1", 4, False), ("sd1", 9, False), ("sd1", 4, True), ("xl", 4, False), ("xl", 4, True)]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "channels", "distilled"), KINDS)
def test_pictures_are_those_of_from_single_file(
    made: Make, tmp_path: Path, no_network: None, family: str, channels: int, distilled: bool
) -> None:
    file, _, folder = made(family, channels, distilled)
    export_bundle(file, tmp_path / "bundle", choices=Choices(prediction_type=PREDICTIONS.get(family, "epsilon")))
    picture = Image.effect_noise((48, 32), 60).convert("RGB")
    mask = Image.fromarray(np.pad(np.full((16, 24), 255, np.uint8), ((8, 8), (12, 12))))
    with quiet():
        pipe = opened(file, folder)
        theirs = drawn(pipe, **({"image": picture, "mask_image": mask, "strength": 1.0} if channels == 9 else {}))
    ours = generated(tmp_path / "bundle", **({"image": picture, "mask": mask} if channels == 9 else {}))
    assert theirs.std() > 5
    assert psnr(ours, theirs) > PSNR_BOUND


@pytest.mark.slow
def test_pictures_of_an_edm_model(made: Make, tmp_path: Path) -> None:
    _, tensors, folder = made("xl")
    marks = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}
    file = write_single(tmp_path / "cosxl.safetensors", tensors | marks)
    export_bundle(file, tmp_path / "bundle")
    with quiet():
        pipe = opened(file, folder)
        pipe.scheduler = diffusers.EDMEulerScheduler(
            sigma_min=0.002,
            sigma_max=120.0,
            sigma_data=1.0,
            prediction_type="v_prediction",
            sigma_schedule="exponential",
        )
        theirs = drawn(pipe)
    assert theirs.std() > 5
    assert psnr(generated(tmp_path / "bundle"), theirs) > PSNR_BOUND


def opened(file: Path, folder: Path) -> Any:
    """Return diffusers' pipeline of a single file; configs come from a folder."""
    kind = getattr(diffusers, read_json(folder / "model_index.json")["_class_name"])
    pipe = kind.from_single_file(str(file), config=str(folder), local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, **given: Any) -> NDArray[np.uint8]:
    settings = {"num_inference_steps": 4, "guidance_scale": 5.0, "generator": torch.Generator().manual_seed(7)}
    return np.asarray(pipe(PROMPT, negative_prompt=NEGATIVE, **settings, **SIZE, **given).images[0])


def generated(bundle: Path, **given: Any) -> NDArray[np.uint8]:
    settings = {"steps": 4, "guidance": 5.0, "seed": 7} | ({"strength": 1.0} if given else {})
    with Engine.load(bundle, threads=1, check_hashes=False, cache=False) as engine:
        return np.asarray(engine(PROMPT, negative_prompt=NEGATIVE, **settings, **SIZE, **given)[0])


@pytest.mark.slow
def test_a_bundle_is_verified_against_its_file(made: Make, tmp_path: Path) -> None:
    file = made("sd1").file
    choices = Choices(prediction_type="v_prediction", vae=file)
    export_bundle(file, tmp_path / "bundle", choices=choices)
    checks = list(verify(tmp_path / "bundle", file, steps=3, choices=choices))
    assert {check.depth for check in checks} >= {"network", "step", "image"}
    assert [check for check in checks if check.passed is False] == []
