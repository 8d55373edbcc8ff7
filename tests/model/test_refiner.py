"""SDXL's refiner against diffusers' image-to-image pipeline, which alone draws with it; on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Run, Theirs, run_pipeline
from tests.support.gpu.host_gpu import HostGpu

PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
ASKED: dict[str, Any] = {"seed": 7, "width": 24, "height": 16, "negative_prompt": "a", "steps": 6}
SCORES = {"aesthetic_score": 9.5, "negative_aesthetic_score": 0.5}


@pytest.fixture(scope="module")
def pair(exported: Exported) -> Iterator[tuple[Engine, Path]]:
    source, bundle = exported("refiner")
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        yield engine, source


def test_networks_are_those_of_torch(pair: tuple[Engine, Path]) -> None:
    engine, folder = pair
    assert [check for check in network_checks(engine, folder) if not check.passed] == []
    assert list(engine.spec.networks) == [
        *("text_encoder_2", "unet_text", "unet", "unet_shallow", "vae_decoder", "vae_encoder")
    ]
    assert not engine.spec.zero_negative


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance": 5.0, "strength": 0.6},
        {"guidance": 5.0, "strength": 0.3, "solver": "dpmpp-2m", **SCORES},
        {"guidance": 1.0, "strength": 1.0, "solver": "euler-ancestral", "aesthetic_score": 3.0},
    ],
    ids=str,
)
def test_pictures_are_those_of_the_pipeline(pair: tuple[Engine, Path], settings: dict[str, Any]) -> None:
    engine, folder = pair
    run = Run(PROMPTS, {**ASKED, "solver": None, **settings}, {"image": PICTURE})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(run.settings["solver"]), run)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_no_negative_prompt_is_an_empty_one(pair: tuple[Engine, Path]) -> None:
    """The base model has zeros there."""
    engine, folder = pair
    with quiet():
        pipe = StableDiffusionXLImg2ImgPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        given = {"image": Image.fromarray(PICTURE), "strength": 0.5, "generator": torch.Generator().manual_seed(7)}
        (theirs,) = pipe("a cat", num_inference_steps=6, guidance_scale=5.0, **given).images
    (ours,) = engine("a cat", image=PICTURE, strength=0.5, seed=7, steps=6, guidance=5.0)
    assert psnr(np.asarray(ours), np.asarray(theirs)) > PSNR_BOUND


def test_scores_change_the_picture_and_are_told_by_it(pair: tuple[Engine, Path]) -> None:
    engine, _ = pair
    plain, same, other, lower = (
        engine("a cat", image=PICTURE, **ASKED, **scores)[0]
        for scores in ({}, {"aesthetic_score": 6.0}, SCORES, {"negative_aesthetic_score": 0.0})
    )
    np.testing.assert_array_equal(plain, same)
    assert not np.array_equal(plain, other)
    assert not np.array_equal(plain, lower)
    assert {name: other.info["latentrt"][name] for name in SCORES} == SCORES
    assert not set(SCORES) & set(plain.info["latentrt"])


def test_other_models_read_no_scores(exported: Exported) -> None:
    with Engine.load(exported("sdxl")[1], threads=1, check_hashes=False) as engine:
        for name in SCORES:
            with pytest.raises(RequestError, match=f"reads no {name}"):
                engine("a cat", steps=1, **{name: 5.0})
    with pytest.raises(RequestError, match=r"aesthetic_score is -1.*from 0 to 1000"):
        engine("a cat", aesthetic_score=-1)


def test_a_device_draws_the_same(pair: tuple[Engine, Path]) -> None:
    here, _ = pair
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        for more in ({}, {"on_tick": lambda job: None}):
            ours, theirs = (
                np.asarray(one("a cat", image=PICTURE, **ASKED, **SCORES, **more)[0]) for one in (there, here)
            )
            assert psnr(ours, theirs) > 60
    gpu.close()
