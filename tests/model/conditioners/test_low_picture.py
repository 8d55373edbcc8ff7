"""The x4 upscaler against diffusers' pipeline, on the host and on a device."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Engine
from latentrt.errors import ExportError, RequestError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.describe import latents_of
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Run, Theirs, run_pipeline
from tests.model.conditioners.conftest import opened
from tests.support.gpu.host_gpu import HostGpu

PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:12, :16] / 16
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
ASKED: dict[str, Any] = {"seed": 7, "negative_prompt": "a", "steps": 5}


@pytest.fixture(scope="module")
def pair(exported: Exported) -> Iterator[tuple[Engine, Path]]:
    with opened(exported, "x4") as both:
        yield both


def test_networks_are_those_of_torch(pair: tuple[Engine, Path]) -> None:
    engine, folder = pair
    assert [check for check in network_checks(engine, folder) if not check.passed] == []
    spec = engine.spec
    assert (spec.latents.factor, spec.low_schedule) == (4, "low_res_scheduler/scheduler_config.json")
    assert (spec.max_noise_level, spec.classes) == (350, None)


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 5.0},
        {"guidance": 1.0, "solver": "euler-ancestral", "noise_level": 0},
        {"guidance": 3.0, "solver": "dpmpp-2m", "noise_level": 350},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(16, 12), (19, 14)], ids=str)
def test_pictures_are_those_of_the_pipeline(
    pair: tuple[Engine, Path], settings: dict[str, Any], size: tuple[int, int]
) -> None:
    """Sides that are no multiples of the factor are resized to the next smaller ones."""
    engine, folder = pair
    picture = np.asarray(Image.fromarray(PICTURE).resize(size))
    run = Run(PROMPTS, {**ASKED, "solver": None, "width": None, "height": None, **settings}, {"image": picture})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(run.settings["solver"]), run)
    assert pictures.shape[1:3] == (48, 64)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_a_device_draws_the_same(pair: tuple[Engine, Path]) -> None:
    here, _ = pair
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        for more in ({}, {"on_tick": lambda job: None}, {"noise": "torch-cuda:t4"}):
            both = (one("a cat", image=PICTURE, noise_level=40, **ASKED, **more)[0] for one in (there, here))
            assert psnr(*map(np.asarray, both)) > 60
    gpu.close()


def test_a_size_is_that_of_the_drawn_picture(pair: tuple[Engine, Path]) -> None:
    engine, _ = pair
    (picture,) = engine("a cat", image=PICTURE, steps=1, width=32, height=24, noise_level=7)
    assert picture.size == (32, 24)
    told = picture.info["latentrt"]
    assert (told["noise_level"], told["image"][:7]) == (7, "sha256:")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "the model enlarges pictures, and there is none.*--image"),
        ({"image": PICTURE, "strength": 0.5}, "strength is 0.5, and .* begins on noise"),
        ({"image": PICTURE, "mask": PICTURE[..., 0]}, "there is a mask, and .* reads none"),
        ({"image": PICTURE, "noise_level": 351}, "noise_level is 351.*from 0 to 350"),
        ({"image": PICTURE, "noise_level": -1}, "noise_level is -1"),
        ({"image": PICTURE, "width": 30}, "width is 30.*multiple of 4"),
    ],
)
def test_what_it_needs_is_said(pair: tuple[Engine, Path], more: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        pair[0]("a cat", steps=1, **more)


def test_other_models_read_no_noise_level(exported: Exported) -> None:
    with (
        Engine.load(exported("sd")[1], threads=1, check_hashes=False) as engine,
        pytest.raises(RequestError, match="reads no noise_level"),
    ):
        engine("a cat", steps=1, noise_level=20)


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("model_index.json", {"low_res_scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "EulerDiscreteScheduler"),
        ("model_index.json", {"low_res_scheduler": None}, "low_res_scheduler None"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "in_channels 7"),
        ("unet/config.json", {"in_channels": 4}, "in_channels 4.*in_channels 7"),
        ("unet/config.json", {"num_class_embeds": None}, "num_class_embeds None.*noise levels"),
    ],
)
def test_other_checkpoints_are_refused(
    exported: Exported, tmp_path: Path, file: str, change: dict[str, Any], words: str
) -> None:
    path = _changed(exported("x4")[0], tmp_path, file, change)
    with pytest.raises(ExportError, match=words):
        open_checkpoint(path)


def test_the_vae_has_the_scale_that_the_pipeline_gives_it(exported: Exported, tmp_path: Path) -> None:
    path = _changed(exported("x4")[0], tmp_path, "vae/config.json", {"scaling_factor": 0.18215})
    checkpoint = open_checkpoint(path)
    assert latents_of(checkpoint).scale == 0.08333
    (path / "low_res_scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ExportError, match="low_res_scheduler"):
        open_checkpoint(path)


def _changed(source: Path, folder: Path, file: str, change: dict[str, Any]) -> Path:
    shutil.copytree(source, folder / "x4")
    path = folder / "x4" / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder / "x4"
