"""The kernels' arithmetic on the emulated device: to the last bit, where numpy has the same operations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from latentrt.cuda import kernels
from latentrt.cuda.kernels import BLEND, PREVIEW
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import TorchCudaNoise
from latentrt.sampling.solvers import SOLVERS
from tests.support.gpu.host_gpu import HostGpu, host_gpu
from tests.support.gpu.rig import SHAPE, Job, Rig, check_inputs, check_slot, run, table_of

STOCHASTIC = ["ddpm", "lcm", "tcd", "euler-ancestral", "dpm2-ancestral", "dpmpp-2m-sde", "dpmpp-3m-sde"]
FEW = settings(deadline=None, max_examples=25)


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
    """Different solvers, lengths, guidance and noise at once; slot 1 is empty and lane 6 belongs to no job."""
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


def test_three_lanes_are_combined_beside_two_and_one(rig: Rig) -> None:
    rig.admit(0, Job(table_of("dpmpp-2m", 7), Guidance(7.5, image=1.5)), (0, 1, 2))
    rig.admit(2, Job(table_of("euler-ancestral", 4), Guidance(3.0, interval=(0.3, 0.8), image=2.0), seed=3), (5, 7, 3))
    rig.admit(3, Job(table_of("ddim", 5), Guidance(4.0), seed=4), (4, 6))
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
    """And not again where lanes move."""
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
