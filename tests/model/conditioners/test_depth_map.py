"""The depth UNet against diffusers' pipeline with the same depth map; how depth maps are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.images.depth_map import depth_of, relative
from latentrt.images.given import open_picture
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Run, Theirs, run_pipeline
from tests.model.conditioners.conftest import opened
from tests.support.gpu.host_gpu import HostGpu

PROMPTS = ["a cat", "a dog"]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
Exported = Callable[[str], tuple[Path, Path]]
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
DEPTH = (np.hypot(*np.mgrid[-5:6:33j, -3:8:29j]) * 4096).astype(np.uint16)  # of its own size, as estimators give it
ASKED: dict[str, Any] = {"seed": 7, "width": 24, "height": 16, "negative_prompt": "a", "steps": 6}


@pytest.fixture(scope="module")
def pair(exported: Exported) -> Iterator[tuple[Engine, Path]]:
    with opened(exported, "depth") as both:
        yield both


def test_networks_are_those_of_torch(pair: tuple[Engine, Path]) -> None:
    engine, folder = pair
    assert [check for check in network_checks(engine, folder) if not check.passed] == []
    assert engine.model.predictor.inputs["depth_map"].shape == ("batch", 1, "height", "width")


@pytest.mark.parametrize(
    ("solver", "strength", "guidance"), [(None, 0.8, 3.0), ("dpmpp-2m-sde", 0.5, 1.0), ("unipc", 1.0, 6.0)]
)
def test_pictures_are_those_of_the_pipeline(
    pair: tuple[Engine, Path], solver: str | None, strength: float, guidance: float
) -> None:
    engine, folder = pair
    settings = {**ASKED, "solver": solver, "strength": strength, "guidance": guidance}
    run = Run(PROMPTS, settings, {"image": PICTURE, "depth": DEPTH})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(solver), run)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_a_device_draws_the_same(pair: tuple[Engine, Path]) -> None:
    here, _ = pair
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        for more in ({}, {"on_tick": lambda job: None}):
            both = (one("a cat", image=PICTURE, depth=DEPTH, **ASKED, **more)[0] for one in (there, here))
            assert psnr(*map(np.asarray, both)) > 60
    gpu.close()


def test_what_it_needs_is_said(pair: tuple[Engine, Path], exported: Exported) -> None:
    engine, _ = pair
    with pytest.raises(RequestError, match=r"draws by depth, and there is no depth map.*--depth"):
        engine("a cat", steps=2, image=PICTURE)
    with pytest.raises(RequestError, match="the model draws on pictures"):
        engine("a cat", steps=2)
    with pytest.raises(RequestError, match="there is a depth map and no picture"):
        engine("a cat", steps=2, depth=DEPTH)
    with (
        Engine.load(exported("sd")[1], threads=1, check_hashes=False) as other,
        pytest.raises(RequestError, match=r"there is a depth map, and .* reads none"),
    ):
        other("a cat", steps=2, image=PICTURE, depth=DEPTH)


@pytest.mark.parametrize("size", [(4, 5), (33, 29), (70, 64), (1, 2)])
def test_it_is_resized_as_torch_does(size: tuple[int, int]) -> None:
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(DEPTH.astype(np.float32))[None, None], size, mode="bicubic", align_corners=False
    )[0].numpy()
    low, high = theirs.min(), theirs.max()
    np.testing.assert_allclose(relative(depth_of(DEPTH), size), 2 * (theirs - low) / (high - low) - 1, atol=2e-6)


def test_every_kind_gives_its_values(tmp_path: Path) -> None:
    low = (DEPTH >> 8).astype(np.uint8)
    for source in (DEPTH, DEPTH.astype(np.float32), Image.fromarray(DEPTH), Image.fromarray(DEPTH.astype(np.int32))):
        np.testing.assert_array_equal(depth_of(source), DEPTH)
    for source in (low, Image.fromarray(low), Image.fromarray(low).convert("RGB"), Image.fromarray(low).convert("LA")):
        np.testing.assert_array_equal(depth_of(source), low)
    Image.fromarray(DEPTH).save(tmp_path / "depth.png")
    np.testing.assert_array_equal(depth_of(open_picture(tmp_path / "depth.png", deep=True)), DEPTH)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (PICTURE, r"the depth map is uint8 \(16, 24, 3\)"),
        ("depth.png", "the depth map is str"),
        (np.full((4, 4), np.nan), "numbers that are not finite"),
        (Image.fromarray(PICTURE), "has colours"),
        (Image.new("LA", (4, 4)), "transparent"),
        (np.ones((4, 4), np.uint8), "the same value everywhere"),
    ],
)
def test_what_is_no_depth_map(source: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        relative(depth_of(source), (4, 4))
