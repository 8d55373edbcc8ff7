"""The kernels' arithmetic on the emulated device: to the last bit, where numpy has the same operations."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from latentrt.cuda import kernels, nvrtc
from latentrt.cuda.kernels import BLEND, PREVIEW, PROGRESS, ROW_COLUMNS, SLOT
from latentrt.images.pixels import to_uint8
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.solvers import SOLVERS
from tests.support.gpu.host_gpu import HostGpu, compile_host, host_gpu
from tests.support.gpu.rig import SHAPE, Job, Rig, check_inputs, check_slot, run, table_of

STOCHASTIC = ["ddpm", "lcm", "tcd", "euler-ancestral", "dpm2-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde"]
HALVES = np.arange(2**16, dtype=np.uint16).view(np.float16)
FEW = settings(deadline=None, max_examples=25)


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    with host_gpu() as gpu:
        yield gpu


@pytest.fixture
def rig(gpu: HostGpu) -> Iterator[Rig]:
    rig = Rig(gpu)
    yield rig
    rig.close()


@pytest.fixture
def half_rig(gpu: HostGpu) -> Iterator[Rig]:
    rig = Rig(gpu, np.float16)
    yield rig
    rig.close()


# ---- One row, and many


@pytest.mark.parametrize("lanes", [(0, 1), (2,)], ids=["guided", "unguided"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_to_the_last_bit(rig: Rig, solver: str, lanes: tuple[int, ...]) -> None:
    rig.admit(0, Job(table_of(solver), Guidance(7.5)), lanes)
    run(rig)
    assert np.isfinite(rig["x"][0]).all()


@pytest.mark.parametrize("solver", ["ddim", "dpmpp-3m-sde", "unipc", "lms"])
@pytest.mark.parametrize("lanes", [(2,), (3, 1)])
def test_half_networks_are_read_and_written_as_numpy_rounds(half_rig: Rig, solver: str, lanes: tuple[int, ...]) -> None:
    half_rig.admit(1, Job(table_of(solver), Guidance(5.0)), lanes)
    run(half_rig)


def test_jobs_of_all_kinds_share_a_batch(rig: Rig) -> None:
    """Different solvers, lengths, guidance and noise at once; slot 1 is empty and lane 6 nobody's."""
    for name, index, value in (("sample", 6, 77), ("timestep", 6, 78), ("x", 1, 79)):
        rig.put(name, index, value)
    rig.admit(0, Job(table_of("dpmpp-2m", 7), Guidance(7.5), seed=10), (0, 1))
    rig.admit(2, Job(table_of("heun", 3), seed=11), (2,))
    rig.admit(3, Job(table_of("euler-ancestral", 4), Guidance(3.0), seed=12, flags=PREVIEW), (5, 3))
    rig.admit(4, Job(table_of("ddpm", 9), Guidance(2.0), TorchCudaNoise(5, 2, 512), 13, BLEND), (4, 7))
    run(rig)
    assert (rig["sample"][6] == 77).all()
    assert rig["timestep"][6] == 78
    assert (rig["x"][1] == 79).all()
    assert rig["progress"][1].tolist() == (0, 0, 0, 0)


def test_a_job_that_is_done_leaves_its_lanes_alone(rig: Rig) -> None:
    """Its last row writes no input: there is no row to write one for."""
    rig.admit(0, Job(table_of("euler", 2)), (0,))
    run(rig)
    assert np.isfinite(rig["sample"][0]).all()
    rig.put("sample", 0, 7)
    rig.put("timestep", 0, 8)
    x = rig["x"][0]
    rig.queue()
    assert (rig["sample"][0] == 7).all()
    assert rig["timestep"][0] == 8
    np.testing.assert_array_equal(rig["x"][0], x)
    assert rig["progress"][0]["row"] == 2


@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.3, 0.9), (0.9, 0.1)])
def test_guidance_acts_in_its_interval(rig: Rig, interval: tuple[float, float]) -> None:
    rig.admit(0, Job(table_of("dpmpp-2m", 8), Guidance(7.5, interval=interval)), (0, 1))
    run(rig)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_guidance_is_rescaled(rig: Rig, rescale: float) -> None:
    """The deviations are summed in another order than numpy's."""
    rig.admit(0, Job(table_of("euler", 6), Guidance(7.5, rescale, (0.2, 1.0))), (0, 1))
    rig.admit(1, Job(table_of("ddim", 6), Guidance(7.5)), (2, 3))
    run(rig, 3e-6)


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "unipc"])
def test_memories_are_clipped(rig: Rig, solver: str) -> None:
    options = {"thresholding": False} if solver == "unipc" else {"clip_sample": True, "clip_sample_range": 0.5}
    rig.admit(0, Job(table_of(solver, **options), Guidance(2.0)), (0, 1))
    run(rig)


def test_previews_are_written_where_they_are_wanted(rig: Rig) -> None:
    rig.admit(0, Job(table_of("euler"), flags=PREVIEW), (0,))
    rig.admit(1, Job(table_of("euler")), (1,))
    run(rig)
    assert np.isfinite(rig["preview"][0]).all()
    assert np.isnan(rig["preview"][1]).all()


def test_what_is_known_is_kept(rig: Rig) -> None:
    job = Job(table_of("euler-ancestral", 5), Guidance(4.0), flags=BLEND)
    rig.admit(0, job, (0, 1))
    run(rig)
    kept = job.mask == 0
    assert 0 < kept.sum() < kept.size
    np.testing.assert_array_equal(rig["x"][0][kept], job.known[kept])


def test_deviations_are_those_of_samples(rig: Rig) -> None:
    job = Job(table_of("euler"), Guidance(5.0, 0.5))
    rig.admit(3, job, (1, 2))
    uncond, cond = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32)
    rig.put("out", 1, uncond)
    rig.put("out", 2, cond + 9)
    kernels.deviations(rig.gpu, rig.state)
    guided = uncond + np.float32(5) * (cond + 9 - uncond)
    np.testing.assert_allclose(rig["deviation"][3], [cond.std(ddof=1), guided.std(ddof=1)], rtol=1e-6)
    assert (rig["deviation"][:3] == 0).all()


# ---- Noise


@pytest.mark.parametrize("solver", STOCHASTIC)
@pytest.mark.parametrize("blocks", [1, 100])
def test_noise_of_the_device_is_torchs_on_cuda(rig: Rig, solver: str, blocks: int) -> None:
    """With one block of 256 threads, or 1, the order of the numbers differs; here with draws before the first row."""
    noise = TorchCudaNoise(2**63 + 5, blocks, 256)
    noise.normal((9,))
    rig.admit(0, Job(table_of(solver), noise=noise), (0,))
    run(rig)


def test_noise_that_fills_every_draw(gpu: HostGpu) -> None:
    """As many numbers as 256 threads draw in whole rounds: the next noise begins with the very next draw."""
    rig = Rig(gpu, shape=(2, 32, 32))
    rig.admit(0, Job(table_of("ddpm", 3), noise=TorchCudaNoise(9, 1, 256), shape=(2, 32, 32)), (0,))
    run(rig)
    rig.close()


def test_the_start_is_made_on_the_device(rig: Rig) -> None:
    """And not once more where lanes move."""
    table, source = table_of("euler-ancestral"), TorchCudaNoise(3, 1, 256)
    job = Job(table, noise=TorchCudaNoise(3, 1, 256))
    rig.admit(0, job, (0,))
    rig.put("x", 0, np.nan)
    rig.seat(0, (0,), table.start)
    job.x = source.normal(SHAPE) * np.float32(table.start)
    job.noise = source
    run(rig, begins=2)


@given(
    seed=st.integers(0, 2**64 - 1),
    blocks=st.integers(1, 6),
    counts=st.lists(st.integers(1, 6000), min_size=1, max_size=3),
    draws=st.integers(0, 2**40),
)
@example(seed=7, blocks=1, counts=[2000, 3], draws=2**32 - 1)
@FEW
def test_normals_are_those_of_the_noise_module(seed: int, blocks: int, counts: list[int], draws: int) -> None:
    source = TorchCudaNoise(seed, blocks, 256)
    source.draws = draws
    with host_gpu() as gpu:
        for count in counts:
            array = gpu.empty((count,), np.float32)
            kernels.normal(gpu, array, seed, source.draws, source.threads(count))
            np.testing.assert_allclose(gpu.download(array), source.normal((count,)), rtol=2e-7)
            gpu.free(array)


# ---- Counting, moving, failing


def test_lanes_may_move_between_rows(rig: Rig) -> None:
    job = Job(table_of("unipc", 6), Guidance(3.0))
    rig.admit(2, job, (0, 1))
    kernels.begin(rig.gpu, rig.state)
    for lanes in [(0, 1), (4, 2), (5, 6), (1, 0)]:
        rig.seat(2, lanes)
        kernels.begin(rig.gpu, rig.state, 2, 1)
        check_inputs(rig, job, 0)
        rig.tick()
        job.step(rig.dtype)
        check_slot(rig, 2, job, 0)


def test_begin_leaves_other_jobs_alone(rig: Rig) -> None:
    rig.admit(1, Job(table_of("euler")), (1,))
    rig.admit(3, Job(table_of("euler")), (3,))
    kernels.begin(rig.gpu, rig.state, 3, 1)
    assert (rig["sample"][1] == 0).all()
    check_inputs(rig, rig.jobs[3], 0)


def test_latents_that_are_not_finite_are_noted_at_their_first_row(rig: Rig) -> None:
    """A clip does not hide them, as it would with fminf and fmaxf."""
    rig.admit(0, Job(table_of("ddpm", clip_sample=True)), (0,))
    rig.admit(1, Job(table_of("euler")), (1,))
    kernels.begin(rig.gpu, rig.state)
    for row in range(4):
        rig.tick()
        if row == 0:
            rig.put("sample", 0, np.nan)
    assert rig["progress"]["bad"].tolist()[:2] == [2, 0]
    assert np.isnan(rig["x"][0, 0, 0, 0])


def test_a_run_is_one_graph(gpu: HostGpu, rig: Rig) -> None:
    """Captured once, launched for two pictures; between rows the host does nothing."""
    jobs = [Job(table_of("dpmpp-2m-sde", 6), Guidance(4.0), TorchCudaNoise(seed, 2, 256), seed) for seed in (1, 2)]
    graph = None
    for job in jobs:
        rig.admit(0, job, (0, 1))
        if graph is None:
            with gpu.capture() as graph:
                kernels.begin(gpu, rig.state)
                for _ in job.table.rows:
                    rig.queue()
        before = len(gpu.host.calls)
        graph.launch()
        assert "cuLaunchKernel" not in gpu.host.calls[before:]
        while not job.done:
            job.step(rig.dtype)
        check_slot(rig, 0, job, 0)
    graph.close()


# ---- To the VAE and from it


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_to_latents(gpu: HostGpu, dtype: Any) -> None:
    x = np.random.default_rng(0).standard_normal((2, *SHAPE), dtype=np.float32) * np.float32(9)
    source, target = gpu.empty(x.shape, np.float32), gpu.empty(x.shape, dtype)
    gpu.upload(x, source)
    kernels.to_latents(gpu, source, target, 0.13025, 0.25)
    expected = (x / np.float32(0.13025) + np.float32(0.25)).astype(dtype)
    np.testing.assert_array_equal(gpu.download(target), expected)
    gpu.free(source)
    gpu.free(target)


@given(st.lists(st.floats(width=32), min_size=1, max_size=300))
@FEW
def test_halves_are_rounded_as_numpy_does(values: list[float]) -> None:
    """The emulation's own conversion; on the GPU it is one instruction."""
    numbers = np.array([*values, *HALVES[:: 2**8], 65519.9, 65520, 2**-25, 2**-24 * 1.5], np.float32)
    with host_gpu() as gpu, np.errstate(all="ignore"):
        source, target = gpu.empty(numbers.shape, np.float32), gpu.empty(numbers.shape, np.float16)
        gpu.upload(numbers, source)
        kernels.to_latents(gpu, source, target, 1, 0)
        np.testing.assert_array_equal(gpu.download(target), (numbers + np.float32(0)).astype(np.float16))
        gpu.free(source)
        gpu.free(target)


def pixels_of(gpu: HostGpu, image: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.int32]]:
    count, _, height, width = image.shape
    source, target = gpu.empty(image.shape, image.dtype), gpu.empty((count, height, width, 3), np.uint8)
    bad = gpu.zeros((count,), np.int32)
    gpu.upload(image, source)
    kernels.to_pixels(gpu, source, target, bad)
    results = gpu.download(target), gpu.download(bad)
    for array in (source, target, bad):
        gpu.free(array)
    return results


def test_every_half_becomes_the_same_pixel_as_in_numpy(gpu: HostGpu) -> None:
    finite = np.where(np.isfinite(HALVES), HALVES, np.float16(0))
    image = np.resize(finite, (2, 3, 128, 256)).astype(np.float16)
    pixels, bad = pixels_of(gpu, image)
    np.testing.assert_array_equal(pixels, to_uint8(image))
    assert bad.tolist() == [0, 0]


def test_ties_are_rounded_to_even(gpu: HostGpu) -> None:
    middles = np.float32(2 * (np.arange(255) + 0.5) / 255 - 1)
    near = (middles[:, None] + np.arange(-8, 9, dtype=np.float32) * np.float32(2**-24)).reshape(1, 3, 85, 17)
    scaled = (near * np.float32(0.5) + np.float32(0.5)) * np.float32(255)
    assert (scaled % 1 == 0.5).sum() > 300
    np.testing.assert_array_equal(pixels_of(gpu, near)[0], to_uint8(near))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_pictures_that_are_not_finite_are_told_apart(gpu: HostGpu, value: float) -> None:
    image = np.linspace(-1.2, 1.2, 3 * 3 * 5 * 7, dtype=np.float32).reshape(3, 3, 5, 7)
    spoiled = image.copy()
    spoiled[1, 2, 4, 6] = value
    pixels, bad = pixels_of(gpu, spoiled)
    assert bad.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(pixels[[0, 2]], to_uint8(image)[[0, 2]])


# ---- Structures and the emulation itself


def layout_checks(place: str) -> str:
    """C++ that does not compile unless the structures are those of kernels.py; `place` tells a field's offset."""
    names = [name for name, _ in kernels._State._fields_]
    state = np.dtype([(name, np.uint64 if name in kernels._POINTERS else np.int32) for name in names], align=True)
    row = np.dtype([*((name, np.float32) for name in ROW_COLUMNS[:8]), ("b", np.float32, 4)])
    row = np.dtype([*row.descr, *((name, np.float32) for name in ROW_COLUMNS[12:])])
    structures = {"State<half>": state, "State<float>": state, "Slot": SLOT, "Progress": PROGRESS, "Row": row}
    assert state.itemsize == ctypes.sizeof(kernels._State)
    checks = "".join(f'static_assert(sizeof({name}) == {d.itemsize}, "");\n' for name, d in structures.items())
    for name, dtype in structures.items():
        for field, (_, offset, *_) in (dtype.fields or {}).items():
            checks += f'static_assert({place.format(name, field)} == {offset}, "");\n'
    return checks


def test_structures_agree_on_the_host() -> None:
    compile_host(layout_checks("__builtin_offsetof({}, {})"))


def test_structures_agree_on_the_device() -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    checks = layout_checks("__INTADDR__(&(({}*)0)->{})")  # how NVRTC's front end spells offsetof
    nvrtc.compiled(nvrtc.SOURCE.read_bytes() + checks.encode(), ("--gpu-architecture=sm_90", "--std=c++17"))


def test_the_emulation_notices_a_barrier_that_not_all_threads_reach() -> None:
    library = compile_host(
        "static void uneven() { if (threadIdx.x == 1) __syncthreads(); }\n"
        'extern "C" bool run_uneven() { return host::Launch{{1, 1}, 2, uneven}.run(); }\n'
    )
    library.run_uneven.restype = ctypes.c_bool
    assert not library.run_uneven()
