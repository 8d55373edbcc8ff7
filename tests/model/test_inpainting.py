"""Nine-channel inpainting UNets against diffusers' inpainting pipelines, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, Theirs, plain_folder, run_pipeline
from tests.support.gpu.host_gpu import HostGpu

PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
MASK = (np.hypot(x - 0.4, y - 0.3) < 0.2).astype(np.uint8) * 255
ASKED = {"seed": 7, "width": 24, "height": 16, "negative_prompt": "a"}


@pytest.fixture(
    scope="module",
    params=["sd-inpainting", *(pytest.param(f"{name}-inpainting", marks=pytest.mark.slow) for name in ("sd2", "sdxl"))],
)
def pair(exported: Exported, request: pytest.FixtureRequest) -> Iterator[tuple[Engine, Path]]:
    """Yield our engine, and the checkpoint as diffusers opens it."""
    source, bundle = exported(request.param)
    with (
        plain_folder(open_checkpoint(source)) as folder,
        Engine.load(bundle, threads=1, check_hashes=False) as engine,
    ):
        yield engine, folder


@pytest.mark.parametrize(
    ("solver", "strength", "guidance"), [(None, 1.0, 3.0), ("ddim", 0.6, 5.0), ("dpmpp-2m-sde", 0.8, 1.0)]
)
def test_pictures_are_those_of_the_pipeline(
    pair: tuple[Engine, Path], solver: str | None, strength: float, guidance: float
) -> None:
    engine, folder = pair
    settings = {**ASKED, "steps": 6, "solver": solver, "strength": strength, "guidance": guidance}
    run = Run(PROMPTS, settings, {"image": PICTURE, "mask": MASK})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(solver), run)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_a_device_draws_the_same(pair: tuple[Engine, Path]) -> None:
    here, _ = pair
    settings: dict[str, Any] = {**ASKED, "steps": 3, "image": PICTURE, "mask": MASK}
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        for more in ({}, {"on_tick": lambda job: None}):
            ours, theirs = (np.asarray(one("a cat", **settings, **more)[0]) for one in (there, here))
            assert psnr(ours, theirs) > 60
    gpu.close()


def test_what_it_needs_is_said(pair: tuple[Engine, Path]) -> None:
    engine, _ = pair
    with pytest.raises(RequestError, match=r"the model repaints pictures\. Needed: a picture, and a mask"):
        engine("a cat", steps=1)
    with pytest.raises(RequestError, match="there is no mask"):
        engine("a cat", steps=2, image=Image.fromarray(PICTURE))
