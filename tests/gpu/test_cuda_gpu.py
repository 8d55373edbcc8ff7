"""The kernels and `Gpu` on a real device: the arithmetic that the emulated one shows, to the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from latentrt.cuda import kernels
from latentrt.cuda.gpu import Gpu
from latentrt.cuda.kernels import BLEND, PREVIEW, PROGRESS
from latentrt.errors import BackendError, DeviceMemoryError, MissingDependencyError
from latentrt.images.pixels import to_uint8
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.solvers import SOLVERS
from tests.support.gpu.rig import SHAPE, Job, Rig, check_slot, run, table_of

pytestmark = pytest.mark.gpu
FAST_SINE = 2e-5  # the most that a normal differs for the GPU's fast sine: 2**-21 times the largest radius, and some


@pytest.fixture(scope="module")
def gpu() -> Iterator[Gpu]:
    try:
        gpu = Gpu()
    except (BackendError, MissingDependencyError) as error:
        pytest.skip(str(error))
    yield gpu
    gpu.close()


@pytest.fixture(params=[np.float16, np.float32], ids=["half", "float"])
def rig(gpu: Gpu, request: pytest.FixtureRequest) -> Iterator[Rig]:
    rig = Rig(gpu, request.param)
    yield rig
    rig.close()


@pytest.mark.parametrize("lanes", [(0, 1), (2,)], ids=["guided", "unguided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_to_the_last_bit(rig: Rig, solver: str, lanes: tuple[int, ...]) -> None:
    rig.admit(0, Job(table_of(solver), Guidance(7.5)), lanes)
    run(rig)


def test_jobs_of_all_kinds_share_a_batch(rig: Rig) -> None:
    rig.admit(0, Job(table_of("dpmpp-2m", 7), Guidance(7.5, interval=(0.2, 0.8)), seed=10), (0, 1))
    rig.admit(2, Job(table_of("heun", 3), seed=11), (2,))
    rig.admit(3, Job(table_of("euler-ancestral", 4), Guidance(3.0), seed=12, flags=PREVIEW | BLEND), (5, 3))
    rig.admit(4, Job(table_of("ddpm", 9, clip_sample=True), Guidance(2.0), seed=13), (4, 7))
    run(rig)


def test_guidance_is_rescaled(gpu: Gpu) -> None:
    rig = Rig(gpu)
    rig.admit(0, Job(table_of("euler", 6), Guidance(7.5, 0.7)), (0, 1))
    run(rig, 3e-6)
    rig.close()


@pytest.mark.parametrize("count", [5, 4 * 64 * 64, 1_000_003])
def test_normals_are_those_of_the_noise_module(gpu: Gpu, count: int) -> None:
    source = TorchCudaNoise(2**40 + 7, 132, 2048)
    array = gpu.empty((count,), np.float32)
    for _ in range(2):
        draws = source.draws
        expected = source.normal((count,))
        kernels.normal(gpu, array, source.seed, draws, source.threads(count))
        np.testing.assert_allclose(gpu.download(array), expected, atol=FAST_SINE)
    gpu.free(array)


@pytest.mark.parametrize("count", [5, 4 * 64 * 64, 4_000_003])
def test_normals_are_torchs_to_the_last_bit(gpu: Gpu, count: int) -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    device = torch.cuda.get_device_properties(gpu.ordinal)
    source = TorchCudaNoise(77, device.multi_processor_count, device.max_threads_per_multi_processor)
    generator = torch.Generator(f"cuda:{gpu.ordinal}").manual_seed(77)
    array = gpu.empty((count,), np.float32)
    for _ in range(2):
        theirs = torch.randn(count, generator=generator, device=generator.device).cpu().numpy()
        kernels.normal(gpu, array, source.seed, source.draws, source.threads(count))
        np.testing.assert_array_equal(gpu.download(array), theirs)
        source.normal((count,))
    gpu.free(array)


def test_a_run_is_one_graph_and_each_launch_is_the_same(gpu: Gpu) -> None:
    """With a network that always answers the same, so that nothing but the kernels runs."""
    rig = Rig(gpu, np.float16)
    job = Job(table_of("dpmpp-2m-sde", 8), Guidance(4.0), TorchCudaNoise(3, 2, 256))
    rig.admit(0, job, (0, 1))
    gpu.upload(np.random.default_rng(0).standard_normal(rig.state.out.shape).astype(np.float16), rig.state.out)
    with gpu.capture() as graph:
        kernels.begin(gpu, rig.state)
        for _ in job.table.rows:
            kernels.deviations(gpu, rig.state)
            kernels.advance(gpu, rig.state)
    results = []
    for _ in range(3):
        rig.put("x", 0, job.x)
        rig.put("progress", 0, np.zeros((), PROGRESS))
        graph.launch()
        results.append(rig["x"][0])
        assert rig["progress"][0].tolist() == (len(job.table), sum(row.c != 0 for row in job.table.rows), 0, 0)
    assert np.isfinite(results[0]).all()
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])
    graph.close()
    rig.close()


def test_many_blocks_move_a_row_on_once(gpu: Gpu) -> None:
    """The count of finished blocks holds where blocks really run at once."""
    rig = Rig(gpu)
    job = Job(table_of("euler", 30))
    for slot in range(5):
        rig.admit(slot, job, (slot,))
    with gpu.capture() as graph:
        for _ in range(10):
            kernels.advance(gpu, rig.state)
    for rows in (10, 20, 30, 30):
        graph.launch()
        assert rig["progress"]["row"].tolist() == [rows] * 5
    assert (rig["progress"]["arrived"] == 0).all()
    graph.close()
    rig.close()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_pixels_are_numpys(gpu: Gpu, dtype: Any) -> None:
    image = np.random.default_rng(1).uniform(-1.2, 1.2, (2, 3, 24, 40)).astype(dtype)
    source, target = gpu.empty(image.shape, dtype), gpu.empty((2, 24, 40, 3), np.uint8)
    bad = gpu.zeros((2,), np.int32)
    gpu.upload(image, source)
    kernels.to_pixels(gpu, source, target, bad)
    np.testing.assert_array_equal(gpu.download(target), to_uint8(image))
    assert gpu.download(bad).tolist() == [0, 0]
    image[1, 1, 3, 3] = np.inf
    gpu.upload(image, source)
    kernels.to_pixels(gpu, source, target, bad)
    assert gpu.download(bad).tolist() == [0, 1]
    for array in (source, target, bad):
        gpu.free(array)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_numpys(gpu: Gpu, dtype: Any) -> None:
    x = np.random.default_rng(2).standard_normal((3, *SHAPE), dtype=np.float32) * np.float32(9)
    source, target = gpu.empty(x.shape, np.float32), gpu.empty(x.shape, dtype)
    gpu.upload(x, source)
    kernels.to_latents(gpu, source, target, 0.13025, 0.25)
    expected = (x / np.float32(0.13025) + np.float32(0.25)).astype(dtype)
    np.testing.assert_array_equal(gpu.download(target), expected)
    gpu.free(source)
    gpu.free(target)


def test_latents_that_are_not_finite_are_noted(gpu: Gpu) -> None:
    rig = Rig(gpu, np.float16)
    job = Job(table_of("euler", 3), Guidance(2.0))
    rig.admit(1, job, (0, 1))
    kernels.begin(gpu, rig.state)
    rig.tick()
    job.step(rig.dtype)
    check_slot(rig, 1, job, 0)
    rig.put("sample", 0, np.inf)
    rig.tick()
    assert rig["progress"]["bad"].tolist() == [0, 2, 0, 0, 0]
    rig.close()


def test_an_upload_may_be_changed_at_once(gpu: Gpu) -> None:
    target = gpu.empty((2**22,), np.float32)
    array = np.ones(2**22, np.float32)
    gpu.upload(array, target)
    array[:] = 2
    assert (gpu.download(target) == 1).all()
    gpu.free(target)


def test_columns(gpu: Gpu) -> None:
    part = np.arange(12, dtype=np.float16).reshape(4, 3)
    source, target = gpu.empty((4, 3), np.float16), gpu.zeros((4, 7), np.float16)
    gpu.upload(part, source)
    gpu.copy_columns(source, target, 2)
    np.testing.assert_array_equal(gpu.download(target)[:, 2:5], part)
    assert gpu.download(target).sum() == part.sum()
    gpu.free(source)
    gpu.free(target)


def test_too_much_memory_is_told_and_the_device_stays_usable(gpu: Gpu) -> None:
    _, total = gpu.memory()
    with pytest.raises(DeviceMemoryError, match="MiB are free"):
        gpu.empty((2 * total,), np.uint8)
    gpu.free(gpu.zeros((4,), np.float32))


def test_time_goes_on(gpu: Gpu) -> None:
    array = gpu.empty((2**24,), np.float32)
    start = gpu.mark()
    kernels.normal(gpu, array, 1, 0, 256 * 1024)
    assert gpu.milliseconds(start, gpu.mark()) > 0
    gpu.free(array)
