"""Runs of several parts, against diffusers: hires fix as text-to-image and then image-to-image on latents, and the part
of a schedule that SDXL's base and refiner each run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers import schedulers as diffusers_schedulers

from latentrt import Engine
from latentrt.errors import BundleError, RequestError, ScheduleError
from latentrt.run.stages import enlarged
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.solvers import SOLVERS
from latentrt.sampling.table import tabulate
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import psnr
from tests.support.gpu.host_gpu import HostGpu
from tests.support.sampling.scheduler_configs import SDXL

Exported = Callable[[str], tuple[Path, Path]]
HIRES: dict[str, Any] = {"steps": 4, "seed": 3, "guidance": 3.0, "height": 16, "width": 24, "solver": "ddim"}
HIRES |= {"hires_scale": 1.5, "hires_steps": 6, "hires_strength": 0.5, "negative_prompt": "a"}


@pytest.mark.parametrize(("height", "width"), [(16, 24), (9, 13), (7, 8)])
def test_latents_are_enlarged_as_torch_does_it(height: int, width: int) -> None:
    latents = np.random.default_rng(0).standard_normal((4, 7, 8)).astype(np.float32)
    theirs = torch.nn.functional.interpolate(torch.from_numpy(latents[None]), size=(height, width), mode="bilinear")
    np.testing.assert_allclose(enlarged(latents, height, width), theirs[0].numpy(), atol=3e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_hires_fix_is_two_pipelines(exported: Exported) -> None:
    source, bundle = exported("sd")
    with quiet():
        first = StableDiffusionPipeline.from_pretrained(source, safety_checker=None, feature_extractor=None)
        first.scheduler = diffusers_schedulers.DDIMScheduler.from_config(first.scheduler.config)
        second = StableDiffusionImg2ImgPipeline.from_pipe(first)
        for pipe in (first, second):
            pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(3)
        same: dict[str, Any] = {"negative_prompt": "a", "guidance_scale": 3.0, "generator": generator}
        small = first("a cat", height=16, width=24, num_inference_steps=4, output_type="latent", **same).images
        large = torch.nn.functional.interpolate(small, size=(12, 18), mode="bilinear")
        (theirs,) = second("a cat", image=large, strength=0.5, num_inference_steps=6, **same).images
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (ours,) = engine("a cat", **HIRES)
        jobs = engine.requests(["a cat"], HIRES)
        assert jobs[0].rows == 4 + 3
    assert ours.size == (36, 24) == theirs.size
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= 60
    assert ours.info["latentrt"]["hires_scale"] == 1.5


@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:t4"])
@pytest.mark.parametrize("solver", ["ddim", "euler-ancestral"])
def test_hires_fix_on_a_device(exported: Exported, solver: str, noise: str) -> None:
    _, bundle = exported("sd")
    asked = {**HIRES, "solver": solver, "noise": noise}
    gpu = HostGpu()
    with Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as there:
        ours = there(["a cat", "b"], **asked)
    with Engine.load(bundle, threads=1, check_hashes=False) as here:
        theirs = here(["a cat", "b"], **asked)
    for one, other in zip(ours, theirs, strict=True):
        assert psnr(np.asarray(one), np.asarray(other)) > 60
    assert gpu.in_use == 0
    gpu.close()


def test_company_changes_no_bit(exported: Exported) -> None:
    """Jobs with and without a second part, of several sizes, in one run and each alone."""
    _, bundle = exported("sd")
    plain = {name: value for name, value in HIRES.items() if not name.startswith("hires")}
    asked = [HIRES, plain, {**HIRES, "hires_scale": 2.0, "seed": 9}, {**plain, "height": 24, "width": 36}]
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        together = [engine.requests(["a cat"], each)[0] for each in asked]
        engine.run(together)
        for each, job in zip(asked, together, strict=True):
            (alone,) = engine.requests(["a cat"], each)
            engine.run([alone])
            np.testing.assert_array_equal(job.latents, alone.latents)


SERVED = [name for name in SOLVERS if name not in ("lms",)]


@pytest.mark.parametrize("handoff", [0.8, 0.55])
@pytest.mark.parametrize("solver", SERVED)
def test_the_parts_of_a_schedule_are_diffusers(solver: str, handoff: float) -> None:
    """Base and refiner run the timesteps that SDXL's pipelines run, from the same list."""
    schedule = Schedule.from_config(SDXL)
    for steps in (7, 10, 25):
        whole = tabulate(solver, schedule, steps)
        base = tabulate(solver, schedule, steps, denoising_end=handoff)
        cutoff = round(1000 - handoff * 1000)
        kept = sum(t >= cutoff for t in whole.timesteps)  # StableDiffusionXLPipeline.__call__, 7.1
        np.testing.assert_array_equal(base.array, whole.array[:kept])
        assert len(base.known) == kept + 1
        scheduler = SimpleNamespace(
            timesteps=torch.from_numpy(whole.timesteps.copy()),
            order=SOLVERS[solver].calls,
            config=SimpleNamespace(num_train_timesteps=1000),
        )
        theirs, _ = StableDiffusionXLImg2ImgPipeline.get_timesteps(
            SimpleNamespace(scheduler=scheduler), steps, 0.3, "cpu", denoising_start=handoff
        )
        rest = tabulate(solver, schedule, steps, denoising_start=handoff)
        np.testing.assert_array_equal(rest.timesteps, theirs.numpy())


def test_what_has_no_parts_is_refused(exported: Exported) -> None:
    schedule = Schedule.from_config(SDXL)
    with pytest.raises(ScheduleError, match="lms cannot begin midway"):
        tabulate("lms", schedule, 10, denoising_start=0.5)
    for part in ({"denoising_end": 0.01}, {"denoising_start": 0.9999}):
        with pytest.raises(RequestError, match="no row is"):
            tabulate("euler", schedule, 2, **part)
    with pytest.raises(RequestError, match="between 0 and 1"):
        tabulate("euler", schedule, 4, denoising_end=0.0)
    _, bundle = exported("sd")
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        with pytest.raises(RequestError, match="no refiner"):
            engine("a cat", handoff=0.8)
        with pytest.raises(RequestError, match="a picture to begin on"):
            engine("a cat", image=np.zeros((16, 16, 3), np.uint8), hires_scale=2.0)
        with pytest.raises(RequestError, match="a handoff"):
            engine("a cat", handoff=0.8, hires_scale=2.0)
        with pytest.raises(RequestError, match=r"hires_scale is 0\.5"):
            engine("a cat", hires_scale=0.5)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("solver", ["euler", "dpmpp-2m", "heun", "euler-ancestral"])
def test_a_refiner_takes_over_as_in_diffusers(exported: Exported, solver: str) -> None:
    (base_source, base), (refiner_source, refiner) = exported("sdxl"), exported("refiner")
    kind = getattr(diffusers_schedulers, SOLVERS[solver].scheduler)
    with quiet():
        first = StableDiffusionXLPipeline.from_pretrained(base_source)
        second = StableDiffusionXLImg2ImgPipeline.from_pretrained(refiner_source, vae=first.vae)
        for pipe in (first, second):
            pipe.set_progress_bar_config(disable=True)
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        generator = torch.Generator().manual_seed(3)
        same: dict[str, Any] = {"negative_prompt": "a", "guidance_scale": 4.0, "num_inference_steps": 10}
        same["generator"] = generator
        latents = first("a cat", height=16, width=24, denoising_end=0.7, output_type="latent", **same).images
        (theirs,) = second("a cat", image=latents, denoising_start=0.7, **same).images
    asked: dict[str, Any] = {"steps": 10, "guidance": 4.0, "negative_prompt": "a", "seed": 3, "height": 16, "width": 24}
    with Engine.load(base, refiner=refiner, threads=1, check_hashes=False) as engine:
        (ours,) = engine("a cat", solver=solver, handoff=0.7, **asked)
        (plain,) = engine("a cat", solver=solver, **asked)
        (scored,) = engine("a cat", solver=solver, handoff=0.7, aesthetic_score=1.0, **asked)
    assert psnr(np.asarray(ours), np.asarray(theirs)) >= 60
    assert not np.array_equal(np.asarray(ours), np.asarray(plain))
    assert not np.array_equal(np.asarray(ours), np.asarray(scored))


def test_a_refiner_on_a_device_and_in_company(exported: Exported) -> None:
    base, refiner = exported("sdxl")[1], exported("refiner")[1]
    asked: dict[str, Any] = {"steps": 5, "guidance": 4.0, "seed": 3, "height": 16, "width": 24, "solver": "euler"}
    gpu = HostGpu()
    backend = OrtBackend(threads=1, gpu=gpu)
    with (
        Engine.load(base, refiner=refiner, backend=backend, lanes=4, check_hashes=False) as there,
        Engine.load(base, refiner=refiner, threads=1, check_hashes=False) as here,
    ):
        (ours,), (theirs,) = (engine("a cat", handoff=0.5, **asked) for engine in (there, here))
        assert psnr(np.asarray(ours), np.asarray(theirs)) > 60
        together = [here.requests(["a cat"], {**asked, **more})[0] for more in ({}, {"handoff": 0.5}, {"handoff": 0.8})]
        here.run(together)
        (alone,) = here.requests(["a cat"], {**asked, "handoff": 0.5})
        here.run([alone])
        np.testing.assert_array_equal(together[1].latents, alone.latents)
    assert gpu.in_use == 0
    gpu.close()


def test_a_refiner_of_other_latents_is_refused(exported: Exported) -> None:
    with pytest.raises(BundleError, match=r"the refiner .+ has"):
        Engine.load(exported("sd")[1], refiner=exported("refiner")[1], threads=1, check_hashes=False)
