"""Lanes on a GPU, run on the emulated one: the real driver calls and kernels' source, with ONNX Runtime as networks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.errors import DeviceMemoryError, NetworkError, RequestError
from latentrt.model.predictor import Predictor
from latentrt.run.denoiser import Denoiser
from latentrt.run.gpu.device import ROOMS_KEPT, DeviceLanes
from latentrt.run.host import HostLanes
from latentrt.run.job import Job
from latentrt.runtime.base import DeviceNetwork
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import noise_source
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import Kept, noised, tabulate
from tests.support.gpu.host_gpu import HostGpu
from tests.support.models import texts

SIDE = 4  # of the latents, so that a call takes a millisecond
SOLVERS = ["ddim", "euler-ancestral", "heun", "dpmpp-2m", "unipc-3", "pndm", "lcm", "dpmpp-3m-sde"]


@pytest.fixture(scope="module")
def unet() -> Iterator[DeviceNetwork]:
    gpu = HostGpu()
    network = OrtBackend(threads=1, gpu=gpu).load(Bundle.open(EMBEDDED, check_hashes=False), "unet")
    assert isinstance(network, DeviceNetwork)
    yield network
    gpu.close()


def make(
    seed: int, solver: str = "ddim", steps: int = 4, scale: float = 3.0, side: int = SIDE, noise: str = "torch-cpu"
) -> Job:
    bundle = Bundle.open(EMBEDDED, check_hashes=False)
    table = tabulate(solver, Schedule.from_config(bundle.json(bundle.spec.schedule)), steps)
    source = noise_source(noise, seed)
    latents = source.normal((bundle.spec.latents.channels, side, side)) * np.float32(table.start)
    told = texts.told(bundle, 2, np.random.default_rng(seed))
    cond, uncond = ({name: array[lane] for name, array in told.items()} for lane in range(2))
    return Job(table, latents, uncond, cond, source, Guidance(scale))


def run(denoiser: Denoiser, *jobs: Job) -> None:
    for job in jobs:
        denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()


def on_device(unet: DeviceNetwork, *jobs: Job, lanes: int = 4, capture: bool = True) -> None:
    held = DeviceLanes(Predictor([unet]), lanes, capture=capture)
    run(Denoiser(held), *jobs)
    held.close()
    assert unet.gpu.in_use == 0  # type: ignore[attr-defined]


def on_host(unet: DeviceNetwork, *jobs: Job) -> None:
    run(Denoiser(HostLanes(Predictor([unet]), 16)), *jobs)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:t4"])
def test_a_job_is_the_one_of_numpy(unet: DeviceNetwork, solver: str, noise: str) -> None:
    there, here = make(3, solver, noise=noise), make(3, solver, noise=noise)
    on_device(unet, there)
    on_host(unet, here)
    assert there.done
    assert there.row == len(there.table)
    np.testing.assert_allclose(there.latents, here.latents, atol=5e-5 * np.abs(here.latents).max())


def guided(seed: int, guidance: Guidance) -> Job:
    job = make(seed, steps=6)
    job.guidance = guidance
    return job


@pytest.mark.parametrize(
    "guidance", [Guidance(1.0), Guidance(5.0, interval=(0.2, 0.7)), Guidance(5.0, 0.7), Guidance(5.0, interval=(0, 0))]
)
def test_guidance_is_the_one_of_numpy(unet: DeviceNetwork, guidance: Guidance) -> None:
    there, here = guided(5, guidance), guided(5, guidance)
    on_device(unet, there)
    on_host(unet, here)
    np.testing.assert_allclose(there.latents, here.latents, atol=5e-5)


def keeping(seed: int, solver: str = "ddim", steps: int = 5, noise: str = "torch-cpu") -> Job:
    """Return a job that begins on a picture, and repaints the half of it."""
    job = make(seed, solver, noise=noise)
    bundle = Bundle.open(EMBEDDED, check_hashes=False)
    schedule = Schedule.from_config(bundle.json(bundle.spec.schedule))
    job.table = tabulate(solver, schedule, steps, strength=0.7)
    clean, unit, drawn = (job.noise.normal(job.latents.shape) for _ in range(3))
    job.latents = noised(job.table.known[0], clean, unit)
    job.kept = Kept((drawn > 0).astype(np.float32), clean, unit)
    return job


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "queued"])
@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:t4"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_is_kept_as_in_numpy(unet: DeviceNetwork, solver: str, noise: str, capture: bool) -> None:
    there, here = keeping(3, solver, noise=noise), keeping(3, solver, noise=noise)
    on_device(unet, there, capture=capture)
    on_host(unet, here)
    assert there.kept is not None
    np.testing.assert_allclose(there.latents, here.latents, atol=5e-5 * np.abs(here.latents).max())
    whole = there.kept.mask == 0
    np.testing.assert_array_equal(there.latents[whole], there.kept.clean[whole])


def test_a_job_that_keeps_a_part_joins_others(unet: DeviceNetwork) -> None:
    """Memory for kept pictures is taken with the first such job, in the midst of ticks that were captured before;
    no job's latents change by a bit.
    """
    lanes = DeviceLanes(Predictor([unet]), 6)
    denoiser = Denoiser(lanes)
    first, masked, last = make(1, steps=6), keeping(2, "heun"), make(3, "euler-ancestral")
    denoiser.admit(first)
    denoiser.tick()
    before = unet.gpu.in_use  # type: ignore[attr-defined]
    denoiser.admit(masked)
    assert unet.gpu.in_use == before + 3 * 6 * 4 * first.latents.size  # type: ignore[attr-defined]
    denoiser.tick()
    run(denoiser, last)
    lanes.close()
    for job, twin in ((first, make(1, steps=6)), (masked, keeping(2, "heun")), (last, make(3, "euler-ancestral"))):
        on_device(unet, twin, lanes=6)
        np.testing.assert_array_equal(job.latents, twin.latents)


def test_a_captured_tick_is_the_queued_one(unet: DeviceNetwork) -> None:
    captured, queued = make(1, "dpmpp-3m-sde"), make(1, "dpmpp-3m-sde")
    on_device(unet, captured)
    on_device(unet, queued, capture=False)
    np.testing.assert_array_equal(captured.latents, queued.latents)


plans = st.lists(
    st.tuples(
        st.integers(0, 50),
        st.sampled_from(SOLVERS),
        st.integers(1, 4),
        st.sampled_from([1.0, 3.0]),
        st.sampled_from([4, 6]),
    ),
    min_size=1,
    max_size=5,
)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=plans, arrivals=st.lists(st.integers(0, 5), min_size=5, max_size=5))
def test_joining_and_leaving_changes_no_bit(unet: DeviceNetwork, plan: list[Any], arrivals: list[int]) -> None:
    lanes = DeviceLanes(Predictor([unet]), 4)
    denoiser = Denoiser(lanes)
    made = [make(seed, solver, steps, scale, side) for seed, solver, steps, scale, side in plan]
    waiting, tick = sorted(zip(arrivals, made, strict=False), key=lambda pair: pair[0]), 0
    while waiting or denoiser.jobs:
        while waiting and waiting[0][0] <= tick and denoiser.fits(waiting[0][1]):
            denoiser.admit(waiting.pop(0)[1])
        denoiser.tick()
        tick += 1
    lanes.close()
    for job, (seed, solver, steps, scale, side) in zip(made, plan, strict=True):
        twin = make(seed, solver, steps, scale, side)
        on_device(unet, twin)
        np.testing.assert_array_equal(job.latents, twin.latents)


def test_previews_are_those_of_numpy(unet: DeviceNetwork) -> None:
    there, here = make(2, "dpmpp-2m"), make(2, "dpmpp-2m")
    seen: list[list[np.ndarray]] = [[], []]
    for job, lanes, pictures in (
        (there, DeviceLanes(Predictor([unet]), 2), seen[0]),
        (here, HostLanes(Predictor([unet])), seen[1]),
    ):
        denoiser = Denoiser(lanes)
        denoiser.admit(job)
        while denoiser.jobs:
            job.wants_preview = job.row >= 1  # from the second row on
            denoiser.tick()
            if job.preview is not None:
                pictures += [job.preview, job.view]
        lanes.close()
    assert len(seen[0]) == 2 * (len(there.table) - 1)
    np.testing.assert_allclose(seen[0], seen[1], atol=5e-5)


def test_a_job_that_turns_nan_fails_alone(unet: DeviceNetwork) -> None:
    sick, healthy, twin = make(1), make(2), make(2)
    sick.cond = {name: np.full_like(array, np.nan) for name, array in sick.cond.items()}
    on_device(unet, sick, healthy)
    on_device(unet, twin)
    assert isinstance(sick.error, NetworkError)
    assert "row 1 of 4" in str(sick.error)
    np.testing.assert_array_equal(healthy.latents, twin.latents)


def test_a_retired_job_leaves_its_lanes(unet: DeviceNetwork) -> None:
    lanes = DeviceLanes(Predictor([unet]), 2)
    denoiser, first, second, twin = Denoiser(lanes), make(1), make(2), make(2)
    denoiser.admit(first)
    denoiser.tick()
    denoiser.retire(first)
    with pytest.raises(RequestError, match="has run 1 rows"):
        denoiser.admit(first)
    run(denoiser, second)
    lanes.close()
    on_device(unet, twin, lanes=2)
    np.testing.assert_array_equal(second.latents, twin.latents)


def test_rooms_that_nobody_uses_make_place() -> None:
    gpu = HostGpu(memory=6_000_000)
    network = OrtBackend(threads=1, gpu=gpu).load(Bundle.open(EMBEDDED, check_hashes=False), "unet")
    lanes = DeviceLanes(Predictor([network]), 2)
    denoiser = Denoiser(lanes)
    run(denoiser, make(1, side=4))
    small = gpu.in_use
    run(denoiser, make(1, side=64))
    assert gpu.in_use > small
    run(denoiser, make(1, side=4))
    with pytest.raises(DeviceMemoryError, match="asked for"):
        denoiser.admit(make(1, side=128))
    lanes.close()
    assert gpu.in_use == 0
    gpu.close()


def test_memory_of_shapes_is_kept_within_bounds(unet: DeviceNetwork) -> None:
    lanes = DeviceLanes(Predictor([unet]), 2)
    denoiser = Denoiser(lanes)
    for side in range(4, 4 + 2 * (ROOMS_KEPT + 2), 2):
        run(denoiser, make(1, steps=1, side=side))
    assert len(lanes._rooms) == ROOMS_KEPT
    assert min(shapes.latents[1] for shapes in lanes._rooms._values) == 8  # the two oldest made room
    lanes.close()
