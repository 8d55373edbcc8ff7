"""UNets that read the guidance scale (LCM, TCD) against diffusers' pipelines, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
)
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.model.conditioners.guidance_embedding import embedding_of
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import tabulate
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.plans.plan_shapes import shapes_of
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import batch_check, run_engine
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Run, Theirs, run_pipeline
from tests.model.conditioners.conftest import opened
from tests.support.gpu.host_gpu import HostGpu

Exported = Callable[[str], tuple[Path, Path]]
Pair = tuple[Engine, Path]
LATENTS_BOUND, PSNR_BOUND = 1e-5, 70.0
y, x = np.mgrid[:16, :24] / 24
PICTURE = Image.fromarray((np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8))
IGNORED = "ignore:__array__ implementation:DeprecationWarning"


@pytest.fixture(scope="module", params=["lcm", pytest.param("lcm-sdxl", marks=pytest.mark.slow)])
def pair(exported: Exported, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with opened(exported, request.param) as both:
        yield both


@pytest.mark.parametrize("dim", [4, 15, 40, 256])
def test_the_embedding_is_diffusers_own(dim: int) -> None:
    for guidance in (0.0, 1.0, 1.3, 7.5, 8.5, 30.0):
        pipe: Any = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        theirs = pipe(None, torch.tensor([guidance - 1]), dim)[0].numpy()
        ours, rounding = embedding_of(guidance, dim), 1.2e-7 * 1000 * abs(guidance - 1)  # of the largest angles
        np.testing.assert_allclose(ours, theirs, atol=rounding + 1e-7)
        assert np.count_nonzero(np.abs(ours - theirs) > 1e-7) <= dim / 64


@pytest.mark.parametrize(
    ("solver", "steps", "guidance"), [("lcm", 4, 8.5), ("tcd", 5, 1.0), ("euler", 3, 7.5), ("ddim", 4, 0.5)]
)
def test_pictures_are_those_of_stable_diffusions_pipelines(
    pair: Pair, solver: str, steps: int, guidance: float
) -> None:
    engine, folder = pair
    settings = {"seed": 7, "steps": steps, "solver": solver, "guidance": guidance, "width": 24, "height": 16}
    settings |= {"eta": 0.0} if solver == "tcd" else {}  # what these pipelines tell every scheduler by default
    run = Run(["a cat", "a dog"], settings, {})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(solver), run)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


@pytest.mark.filterwarnings(IGNORED)
def test_pictures_are_those_of_lcm_s_own_pipelines(exported: Exported) -> None:
    """All defaults are theirs; on a picture, all steps are made on the lower part of the distilled timesteps."""
    _, bundle = exported("lcm")
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(bundle)
        edits = AutoPipelineForImage2Image.from_pipe(pipe)
        assert type(edits).__name__ == "LatentConsistencyModelImg2ImgPipeline"
        seed = torch.Generator().manual_seed
        (plain,) = pipe("a cat", generator=seed(7)).images
        (drawn,) = pipe("a cat", width=24, height=16, guidance_scale=2.0, generator=seed(7)).images
        (edited,) = edits("a cat", PICTURE, strength=0.3, generator=seed(7)).images
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        assert psnr(np.asarray(engine("a cat", seed=7)[0]), np.asarray(plain)) > PSNR_BOUND
        ours = engine("a cat", width=24, height=16, guidance=2.0, seed=7)
        assert psnr(np.asarray(ours[0]), np.asarray(drawn)) > PSNR_BOUND
        ours = engine("a cat", image=PICTURE, strength=0.3, seed=7)
        assert psnr(np.asarray(ours[0]), np.asarray(edited)) > PSNR_BOUND
        assert ours[0].info["latentrt"]["guidance"] == 8.5


@pytest.mark.parametrize("strength", [0.3, 0.55, 1.0])
def test_lcm_keeps_all_steps_on_the_timesteps_of_diffusers(strength: float) -> None:
    theirs = LCMScheduler()
    theirs.set_timesteps(6, strength=strength)
    schedule = Schedule.from_config({"_class_name": "LCMScheduler"})
    table = tabulate("lcm", schedule, 6, strength=strength, keeps_steps=True)
    assert table.timesteps.tolist() == theirs.timesteps.tolist()
    alpha = theirs.alphas_cumprod[theirs.timesteps[0]].item()
    np.testing.assert_allclose(table.known[0], [alpha**0.5, (1 - alpha) ** 0.5], rtol=1e-6)
    with pytest.raises(RequestError, match=r"16 steps of 15 of 50 original_inference_steps.*a larger strength"):
        tabulate("lcm", schedule, 16, strength=0.3, keeps_steps=True)
    assert len(tabulate("tcd", schedule, 6, strength=strength, keeps_steps=True)) == int(6 * strength)  # it has no such


def test_networks_and_batches_keep_their_bounds(pair: Pair) -> None:
    engine, folder = pair
    checks = [*network_checks(engine, folder), batch_check(engine)]
    assert all(check.passed for check in checks), checks


def test_a_device_draws_the_same_in_one_lane(pair: Pair) -> None:
    here, _ = pair
    assert here.model.most_lanes == here.requests(["a cat"], {"guidance": 9.0})[0].most_lanes == 1
    settings: dict[str, Any] = {"seed": 7, "width": 24, "height": 16, "steps": 3, "solver": "lcm", "guidance": 5.0}
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        assert there.denoiser.lanes == 1
        for more in ({}, {"on_tick": lambda job: None}, {"image": PICTURE, "strength": 0.8}):
            ours, theirs = (np.asarray(one("a cat", **settings, **more)[0]) for one in (there, here))
            assert psnr(ours, theirs) > 60
    gpu.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"negative_prompt": "a"}, "reads no negative_prompt"),
        ({"guidance_rescale": 0.5}, "guidance_rescale is 0.5, and the model reads the guidance scale itself"),
        ({"guidance_interval": (0.0, 0.5)}, r"guidance_interval is \(0.0, 0.5\)"),
        ({"image_guidance": 2.0}, "reads no image_guidance"),
    ],
)
def test_what_it_cannot_use_is_refused_by_name(pair: Pair, settings: dict[str, Any], words: str) -> None:
    engine, _ = pair
    with pytest.raises(RequestError, match=words):
        engine("a cat", steps=1, **settings)


def test_plans_have_one_lane(pair: Pair) -> None:
    engine, _ = pair
    assert shapes_of(engine.spec, {})[0].lanes == (1, 1, 1)
