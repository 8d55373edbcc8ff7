"""Whole pictures of bundles made from single files against diffusers' pipelines of the same files."""

from __future__ import annotations

import socket
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Engine
from latentrt_export.checkpoint.single.choices import Choices
from latentrt_export.checkpoint.source import read_json
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.to_bundle import export_bundle
from latentrt_export.verify.checks import psnr
from latentrt_export.verify.verify import verify
from tests.export.checkpoint.single.conftest import Make

PSNR_BOUND = 50.0
SIZE = {"height": 32, "width": 48}
SLOW = [("sd1", 4, False), ("sd1", 9, False), ("sd1", 4, True), ("xl", 4, False), ("xl", 4, True)]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.mark.parametrize(
    ("family", "channels", "distilled"),
    [("sd2", 4, False), *(pytest.param(*kind, marks=pytest.mark.slow) for kind in SLOW)],
)
def test_pictures_are_those_of_from_single_file(
    made: Make, tmp_path: Path, no_network: None, family: str, channels: int, distilled: bool
) -> None:
    file, _, folder = made(family, channels, distilled)
    choices = Choices(prediction_type="v_prediction" if family == "sd2" else "epsilon")
    export_bundle(file, tmp_path / "bundle", choices=choices)
    picture = Image.effect_noise((48, 32), 60).convert("RGB")
    mask = Image.fromarray(np.pad(np.full((16, 24), 255, np.uint8), ((8, 8), (12, 12))))
    given = {"image": picture, "mask_image": mask, "strength": 1.0} if channels == 9 else {}
    kind = read_json(folder / "model_index.json")["_class_name"]
    with quiet():
        pipe = getattr(diffusers, kind).from_single_file(str(file), config=str(folder), local_files_only=True)
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            "a photo of a cat",
            negative_prompt="a dog",
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(7),
            **SIZE,
            **given,
        ).images[0]
    ours = {"image": picture, "mask": mask, "strength": 1.0} if channels == 9 else {}
    with Engine.load(tmp_path / "bundle", threads=1, check_hashes=False, cache=False) as engine:
        found = engine("a photo of a cat", negative_prompt="a dog", steps=4, guidance=5.0, seed=7, **SIZE, **ours)[0]
    assert np.asarray(theirs).std() > 5
    assert psnr(np.asarray(found), np.asarray(theirs)) > PSNR_BOUND


@pytest.mark.slow
def test_a_bundle_is_verified_against_its_file(made: Make, tmp_path: Path) -> None:
    file = made("sd1").file
    choices = Choices(prediction_type="v_prediction", vae=file)
    export_bundle(file, tmp_path / "bundle", choices=choices)
    checks = list(verify(tmp_path / "bundle", file, steps=3, choices=choices))
    assert {check.depth for check in checks} >= {"network", "step", "image"}
    assert [check for check in checks if check.passed is False] == []
