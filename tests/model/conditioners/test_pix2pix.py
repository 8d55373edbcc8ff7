"""UNets that edit a picture as the prompt says, against diffusers' pipelines, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.runtime.onnxruntime import OrtBackend
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
LATENTS_BOUND, PSNR_BOUND = 3e-5, 70.0
y, x = np.mgrid[:16, :24] / 24
PICTURE = (np.stack([x, y, x * y], axis=-1) * 255).astype(np.uint8)
SIZE = {"width": 24, "height": 16}
KINDS = ["pix2pix", pytest.param("pix2pix-sdxl", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=KINDS)
def pair(exported: Exported, request: pytest.FixtureRequest) -> Iterator[Pair]:
    with opened(exported, request.param) as both:
        yield both


@pytest.mark.parametrize(
    ("solver", "guidance", "more"),
    [
        (None, 7.5, {"image_guidance": 1.0}),
        ("euler-ancestral", 4.0, {"image_guidance": 2.5, "negative_prompt": "a"}),
        ("dpmpp-2m", 7.5, {}),
        ("ddim", 1.0, {}),  # guided, SDXL's random UNet magnifies a change of 1e-6 of its noise to 1.8e-4
    ],
)
def test_pictures_are_those_of_the_pipeline(
    pair: Pair, solver: str | None, guidance: float, more: dict[str, Any]
) -> None:
    engine, folder = pair
    settings = {"seed": 7, **SIZE, "steps": 5, "solver": solver, "guidance": guidance, **more}
    run = Run(["a cat", "a dog"], settings, {"image": PICTURE})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(Theirs(folder, engine).pipeline(solver), run)
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", KINDS)
def test_a_user_s_call_gives_the_same(exported: Exported, name: str) -> None:
    """A picture of any size: the first pipeline cuts it to sides that the VAE takes, SDXL's is told them."""
    _, bundle = exported(name)
    image = Image.fromarray(PICTURE).resize((26, 19), Image.Resampling.BICUBIC)
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(bundle)
        assert "InstructPix2Pix" in type(pipe).__name__
        own = {"width": 26, "height": 18} if name.endswith("xl") else {}
        seed = torch.Generator().manual_seed(7)
        (theirs,) = pipe("a cat", image=image, num_inference_steps=4, generator=seed, **own).images
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (ours,) = engine("a cat", image=image, steps=4, seed=7)
    assert ours.size == theirs.size
    assert psnr(np.asarray(ours), np.asarray(theirs)) > PSNR_BOUND
    told = ours.info["latentrt"]
    assert (told["image_guidance"], "strength" in told) == (1.5, False)


@pytest.mark.slow
def test_guidance_rescale_is_the_xl_pipeline_s(exported: Exported) -> None:
    _, bundle = exported("pix2pix-sdxl")
    with quiet():
        pipe = DiffusionPipeline.from_pretrained(bundle)
        (theirs,) = pipe(
            "a cat",
            image=Image.fromarray(PICTURE),
            **SIZE,
            num_inference_steps=4,
            guidance_rescale=0.7,
            generator=torch.Generator().manual_seed(7),
        ).images
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (ours,) = engine("a cat", image=PICTURE, steps=4, seed=7, guidance_rescale=0.7)
    assert psnr(np.asarray(ours), np.asarray(theirs)) > PSNR_BOUND


def test_networks_and_batches_keep_their_bounds(pair: Pair) -> None:
    engine, folder = pair
    checks = [*network_checks(engine, folder), batch_check(engine)]
    assert all(check.passed for check in checks), checks


def test_jobs_of_all_guidances_share_a_batch_bitwise(pair: Pair) -> None:
    """Three lanes, one, three in a part of the run, and with deep features: each as it is alone."""
    engine, _ = pair
    asked: list[dict[str, Any]] = [
        {"guidance": 7.5, "image_guidance": 1.2},
        {"guidance": 1.0, "solver": "heun"},
        {"guidance": 3.0, "guidance_interval": (0.3, 0.8), "solver": "euler-ancestral"},
        {"guidance": 5.0, "image_guidance": 3.0, "cache_interval": 2, "guidance_rescale": 0.5},
    ]

    def jobs() -> list[Any]:
        return [
            engine.requests(["a cat"], {"seed": i, "steps": 4, **one}, {"image": PICTURE})[0]
            for i, one in enumerate(asked)
        ]

    together, alone = jobs(), jobs()
    assert [job.most_lanes for job in together] == [3, 1, 3, 3]
    engine.run(together)
    for job, other in zip(together, alone, strict=True):
        engine.run([other])
        np.testing.assert_array_equal(job.latents, other.latents)


def test_a_device_draws_the_same(pair: Pair) -> None:
    here, _ = pair
    gpu = HostGpu()
    with Engine.load(here.bundle.root, backend=OrtBackend(threads=1, gpu=gpu), lanes=7, check_hashes=False) as there:
        for settings in (
            {"guidance": 6.0},
            {"guidance": 6.0, "image_guidance": 2.0, "guidance_rescale": 0.6, "negative_prompt": "a"},
            {"guidance": 6.0, "guidance_interval": (0.0, 0.6), "cache_interval": 2},
            {"guidance": 6.0, "prompt_syntax": "a1111", "negative_prompt": "a " * 90},  # lanes of two lengths
            {"guidance": 1.0},
        ):
            for more in ({}, {"on_tick": lambda job: None}):
                asked: dict[str, Any] = {"image": PICTURE, "steps": 4, "seed": 7, "solver": "dpmpp-2m", **settings}
                ours, theirs = (
                    np.stack([np.asarray(one) for one in sd(["a cat", "a dog"], **asked, **more)])
                    for sd in (there, here)
                )
                assert psnr(ours, theirs) > 60
    gpu.close()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image": None}, r"the model edits pictures, and there is none\. Needed: a picture"),
        ({"mask": PICTURE[..., 0] > 99}, "there is a mask, and .* reads none"),
        ({"strength": 0.5}, "strength is 0.5, and the model draws anew"),
        ({"image_guidance": 0.9}, "image_guidance is 0.9"),
        ({"image_guidance": 2.0, "guidance": 1.0}, "image_guidance is 2 and guidance 1"),
    ],
)
def test_what_it_cannot_use_is_refused_by_name(pair: Pair, settings: dict[str, Any], words: str) -> None:
    engine, _ = pair
    with pytest.raises(RequestError, match=words):
        engine("a cat", **{"image": PICTURE, "steps": 1, **settings})


def test_plans_are_for_the_lanes_of_a_guided_picture(pair: Pair) -> None:
    engine, _ = pair
    assert shapes_of(engine.spec, {})[0].lanes == (3, 3, 3)
