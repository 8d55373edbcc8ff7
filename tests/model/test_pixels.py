"""Pixel models: no text, no VAE. Whole runs against DDPMPipeline and DDIMPipeline, on the host and on a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from latentrt import Engine
from latentrt.errors import RequestError
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.checkpoint.source import open_checkpoint
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import difference, psnr
from latentrt_export.verify.images import run_engine
from latentrt_export.verify.reference import Run, plain_folder, run_pipeline
from tests.support.gpu.host_gpu import HostGpu
from tests.support.models.pixels import tiny_pixels

Exported = Callable[[str], tuple[Path, Path]]
FOUR = [None] * 4
# The first row divides by sqrt(alpha_cumprod) = 0.0064: the networks' rounding, 1e-6, becomes 1.6e-4 there.
LATENTS_BOUND, PSNR_BOUND = 4e-4, 70.0


@pytest.fixture(scope="module")
def engine(exported: Exported) -> Iterator[Engine]:
    with Engine.load(exported("pixels")[1], threads=1, check_hashes=False) as engine:
        yield engine


@pytest.fixture(scope="module")
def folder(exported: Exported) -> Iterator[Path]:
    """Yield the checkpoint as diffusers opens it."""
    with plain_folder(open_checkpoint(exported("pixels")[0])) as folder:
        yield folder


@pytest.mark.parametrize(
    ("pipeline", "solver", "steps"),
    [("DDPMPipeline", None, 25), ("DDIMPipeline", "ddim", 10), ("DDPMPipeline", "dpmpp-2m", 8)],
)
def test_four_pictures_are_those_of_the_pipeline(
    engine: Engine, folder: Path, pipeline: str, solver: str | None, steps: int
) -> None:
    with quiet():
        pipe = getattr(diffusers, pipeline).from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        if solver == "dpmpp-2m":
            pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    run = Run(FOUR, {"seed": 3, "steps": steps, "solver": solver}, {})
    ours, pictures = run_engine(engine, run)
    theirs, expected = run_pipeline(pipe, run)
    assert len(ours) == len(theirs) == steps
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def test_a_checkpoint_brings_its_own_steps_and_solver(engine: Engine, tmp_path: Path) -> None:
    (job,) = engine.requests([None], {})
    assert (len(job.table), job.table.solver, job.most_lanes) == (1000, "ddpm", 1)
    assert not {"prompt", "guidance"} & set(job.tag)
    flat = tiny_pixels(tmp_path / "flat", flat=True, index=False, scheduler={"_class_name": "DDIMScheduler"})
    assert open_checkpoint(flat).pipeline == "DDIMPipeline"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"prompt": "a cat"}, "reads no prompt"),
        ({"negative_prompt": "blurry"}, "reads no negative_prompt"),
        ({"class_label": 1}, "reads no class_label"),
        ({"guidance": 3.0}, "guidance is 3, and .* reads no prompt"),
        ({"width": 18}, "width is 18.*a multiple of 4"),
        ({"strength": 0.5}, "there is no picture"),
    ],
)
def test_what_it_does_not_read_is_refused(engine: Engine, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        engine(steps=1, **asked)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp-2m", "euler-ancestral"])
@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:t4"])
def test_a_device_draws_the_same_by_ticks_and_in_one_launch(
    engine: Engine, exported: Exported, solver: str, noise: str
) -> None:
    settings = {"steps": 6, "solver": solver, "noise": noise, "seed": 5, "count": 3}
    here = engine(**settings)
    gpu = HostGpu()
    backend = OrtBackend(threads=1, gpu=gpu)
    with Engine.load(exported("pixels")[1], backend=backend, lanes=2, check_hashes=False) as there:
        whole, ticked = there(**settings), there(**settings, on_tick=lambda job: None)
        launches = gpu.host.calls.count("cuMemcpyDtoHAsync")
        there(**settings)
        assert gpu.host.calls.count("cuMemcpyDtoHAsync") - launches == 2  # of two lanes: two pictures, then one
    assert gpu.in_use == 0
    gpu.close()
    for pictures in (whole, ticked):
        assert psnr(_pixels(pictures), _pixels(here)) > 60


def test_a_run_may_begin_on_a_picture(engine: Engine, folder: Path) -> None:
    """No pipeline does this with pixels: diffusers' scheduler, run as its image-to-image pipelines run it."""
    given = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    ours = engine(image=given, strength=0.5, steps=8, solver="ddim", seed=2)[0]
    with quiet():
        pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    pipe.scheduler.set_timesteps(8)
    timesteps = pipe.scheduler.timesteps[4:]
    clean = torch.from_numpy(np.asarray(given).transpose(2, 0, 1)[None] / np.float32(127.5) - 1)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    x = pipe.scheduler.add_noise(clean, noise, timesteps[:1])
    with torch.no_grad():
        for t in timesteps:
            x = pipe.scheduler.step(pipe.unet(x, t).sample, t, x).prev_sample
    expected = (x[0] / 2 + 0.5).clamp(0, 1).numpy().transpose(1, 2, 0)
    assert np.abs(np.asarray(ours) / 255 - expected).max() < 1 / 255
    kept = engine(image=given, mask=np.arange(16) < np.full((16, 1), 8), steps=4, solver="ddim")[0]
    np.testing.assert_array_equal(np.asarray(kept)[:, 8:], np.asarray(given)[:, 8:])


@pytest.mark.parametrize("label", [0, 4])
def test_classes_are_told_by_number(exported: Exported, label: int) -> None:
    source, bundle = exported("classes")
    with quiet():
        pipe = diffusers.DDPMPipeline.from_pretrained(source)
        pipe.set_progress_bar_config(disable=True)
    run = Run([None, None], {"seed": 1, "steps": 5, "class_label": label}, {})
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        ours, pictures = run_engine(engine, run)
        theirs, expected = run_pipeline(pipe, run)
        for asked, words in (({}, "no class label"), ({"class_label": 5}, "class_label is 5.*from 0 to 4")):
            with pytest.raises(RequestError, match=words):
                engine(steps=1, **asked)
        assert engine(steps=1, class_label=2)[0].info["latentrt"]["class_label"] == 2
    assert max(difference(a, b) for a, b in zip(ours, theirs, strict=True)) < LATENTS_BOUND
    assert psnr(pictures, expected) > PSNR_BOUND


def _pixels(pictures: list[Any]) -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture) for picture in pictures])
