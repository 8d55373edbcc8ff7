"""Whole pictures on the GPU: those of the CPU, in any batch and any kind of launch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED
from latentrt.errors import DeviceMemoryError
from latentrt.run.denoiser import Denoiser
from latentrt.run.job import Job
from latentrt.sampling.solvers import SOLVERS
from tests.gpu.gpu_rig import SCALE, GpuRig

pytestmark = pytest.mark.gpu
Draw = Callable[..., NDArray[np.uint8]]
SETTINGS: dict[str, Any] = {"width": SCALE.pixels, "height": SCALE.pixels, "steps": SCALE.steps}
GRANULE = 2**21  # bytes; the unit in which CUDA takes memory from the device


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.square(a.astype(np.float64) - b.astype(np.float64)).mean()
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


@pytest.fixture(scope="module")
def here() -> Any:
    """Return the same engine in numpy, with ONNX Runtime on the CPU; test_verify.py compares it with diffusers."""
    with Engine.load(threads=None, check_hashes=False) as engine:
        yield engine


def diffusers_picture(prompt: str, solver: str, seed: int) -> NDArray[np.uint8]:
    """Return diffusers' picture in float32, on the CPU."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        Path(EMBEDDED), torch_dtype=torch.float32, local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    scheduler = getattr(diffusers, SOLVERS[solver].scheduler)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **SOLVERS[solver].settings)
    generator = torch.Generator().manual_seed(seed)
    sides = {"width": SCALE.pixels, "height": SCALE.pixels}
    made = pipe(prompt, num_inference_steps=SCALE.steps, guidance_scale=3.0, generator=generator, **sides)
    return np.asarray(made.images[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("solver", ["dpmpp-2m", "euler-ancestral"])
def test_pictures_are_diffusers(rig: GpuRig, draw: Draw, solver: str) -> None:
    with rig.engine() as engine:
        (ours,) = draw(engine, "a red apple", solver=solver, seed=7)
    assert psnr(ours, diffusers_picture("a red apple", solver, 7)) > 40


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "dpmpp-2m"},
        {"solver": "unipc", "guidance_interval": (0.4, 1.0), "count": 3},
        {"solver": "heun", "guidance": 6.0, "guidance_rescale": 0.7, "negative_prompt": "blue"},
        {"solver": "euler-ancestral", "noise": "torch-cuda:t4"},
        {"solver": "ddim", "guidance": 1.0},
    ],
    ids=lambda settings: settings["solver"],
)
def test_pictures_are_those_of_the_cpu(rig: GpuRig, draw: Draw, here: Engine, settings: dict[str, Any]) -> None:
    prompts = ["a red apple", "a cat face"]
    with rig.engine() as engine:
        ours = draw(engine, prompts, **settings)
    assert psnr(ours, draw(here, prompts, **settings)) > 40


@pytest.mark.parametrize("ticks", [False, True], ids=["one launch", "ticks"])
def test_captured_is_queued_to_the_last_bit(rig: GpuRig, draw: Draw, ticks: bool) -> None:
    more = {"on_tick": lambda job: None} if ticks else {}
    made = []
    for capture in (True, False):
        with rig.engine(capture=capture) as engine:
            made.append(draw(engine, ["a red apple", "a cat face"], solver="dpmpp-3m-sde", **more))
    np.testing.assert_array_equal(*made)


def test_every_launch_draws_the_same(rig: GpuRig, draw: Draw) -> None:
    with rig.engine() as engine:
        first = draw(engine, "a red apple", seed=3)
        draw(engine, "a green car", seed=4, solver="ddim")
        np.testing.assert_array_equal(draw(engine, "a red apple", seed=3), first)


def latents(engine: Engine, *seeds: int, late: int = 0) -> list[NDArray[np.float32]]:
    """Run jobs in one batch, the last of which joins `late` rows after the others; each leaves when it is done."""
    jobs = [engine.requests(["a red apple"], {**SETTINGS, "seed": seed, "steps": 2 + seed})[0] for seed in seeds]
    denoiser: Denoiser = engine.denoiser
    for job in jobs[: len(jobs) - 1]:
        denoiser.admit(job)
    for _ in range(late):
        denoiser.tick()
    denoiser.admit(jobs[-1])
    while denoiser.jobs:
        denoiser.tick()
    return [job.latents for job in jobs]


def test_company_changes_no_bit(rig: GpuRig) -> None:
    """The job of seed 2 alone, in other lanes beside another job, and joining one in progress."""
    with rig.engine() as engine:
        (alone,) = latents(engine, 2)
        for company in (latents(engine, 2, 1)[0], latents(engine, 1, 2)[1], latents(engine, 3, 2, late=2)[1]):
            np.testing.assert_array_equal(company, alone)


def test_pictures_of_one_launch_do_not_depend_on_each_other(rig: GpuRig, draw: Draw) -> None:
    with rig.engine() as engine:
        both = draw(engine, ["a red apple", "a cat face"], seed=1)
        np.testing.assert_array_equal(draw(engine, ["a red apple"], seed=1), both[:1])
        np.testing.assert_array_equal(draw(engine, ["a cat face"], seed=2), both[1:])


def previews(engine: Engine) -> list[NDArray[np.float32]]:
    seen: list[NDArray[np.float32]] = []
    (job,) = engine.requests(["a red apple"], {**SETTINGS, "seed": 5})
    job.wants_preview = True

    def keep(job: Job) -> None:
        assert job.preview is not None
        seen.append(job.preview.copy())

    engine.run([job], keep)
    return seen


def test_previews_are_those_of_the_cpu(rig: GpuRig, here: Engine) -> None:
    with rig.engine() as engine:
        ours = previews(engine)
    theirs = previews(here)
    assert len(ours) == len(theirs) == SCALE.steps
    for a, b in zip(ours, theirs, strict=True):
        assert np.linalg.norm(a - b) < (5e-2 if rig.half else 2e-3) * np.linalg.norm(b)


def test_cancelling_leaves_the_others(rig: GpuRig) -> None:
    with rig.engine() as engine:
        (alone,) = latents(engine, 2)
        first, second = (engine.requests(["a red apple"], {**SETTINGS, "seed": s, "steps": 4})[0] for s in (1, 2))

        def cancel(job: Job) -> None:
            if job is first and job.row == 1:
                engine.denoiser.retire(job)

        engine.run([first, second], cancel)
        assert not first.done
        np.testing.assert_array_equal(second.latents, alone)
        assert not engine.denoiser.jobs


class Stopped(Exception):  # noqa: N818
    pass


def test_a_run_that_is_ended_leaves_the_engine_as_it_was(rig: GpuRig, draw: Draw) -> None:
    def stop(job: Job) -> None:
        raise Stopped

    with rig.engine() as engine:
        before = draw(engine)
        with pytest.raises(Stopped):
            draw(engine, on_tick=stop)
        assert not engine.denoiser.jobs
        np.testing.assert_array_equal(draw(engine), before)


def test_too_little_memory_is_said_and_survived(rig: GpuRig, draw: Draw) -> None:
    with rig.engine() as engine:
        before, held = draw(engine), []
        size = rig.gpu.memory()[0]
        while size >= GRANULE:  # all of the free memory
            try:
                held.append(rig.gpu.empty((size,), np.uint8))
            except DeviceMemoryError:
                size //= 2
        try:
            with pytest.raises(DeviceMemoryError, match="are free"):  # more than earlier pictures can free
                engine("a red apple", width=4096, height=4096, steps=1)
        finally:
            for array in held:
                rig.gpu.free(array)
        np.testing.assert_array_equal(draw(engine), before)


def host_bytes() -> int:
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


def test_memory_does_not_grow(rig: GpuRig, draw: Draw) -> None:
    """Pictures of two kinds in turn, one launch each; then the same by ticks, a tenth as many."""
    with rig.engine() as engine:

        def some(count: int) -> None:
            for number in range(count):
                draw(engine, f"a red apple {number}", seed=number, steps=1 + number % 2)
                if number % 10 == 0:
                    draw(engine, f"a cat {number}", seed=number, steps=2, on_tick=lambda job: None)
            gc.collect()

        some(SCALE.many // 10)
        device, host = rig.gpu.memory()[0], host_bytes()
        some(SCALE.many)
        assert abs(rig.gpu.memory()[0] - device) < GRANULE
        assert host_bytes() - host < 32 * 2**20
