"""Jobs, lanes and ticks: a job's latents never depend on the other jobs in its batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.errors import NetworkError, RequestError
from latentrt.model.predictor import Predictor
from latentrt.run.denoiser import Denoiser
from latentrt.run.host import HostLanes
from latentrt.run.job import Job, Stage
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import NoiseSource, TorchCpuNoise
from latentrt.sampling.schedule import Schedule
from latentrt.sampling.table import advance, tabulate

SCHEDULE = Schedule.from_config(
    {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    | {"clip_sample": False, "steps_offset": 1}
)
SOLVERS = ["ddim", "euler-ancestral", "heun", "dpmpp-2m", "unipc-3", "pndm", "lcm", "dpmpp-3m-sde"]


def network(sample: np.ndarray, timestep: np.ndarray, conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
    """Predict as a stand-in UNet that works on each lane alone."""
    pull = conditioning["encoder_hidden_states"].mean(axis=(1, 2))[:, None, None, None]
    return np.tanh(sample) * np.float32(0.7) + pull + (timestep / 1000)[:, None, None, None]


def make(
    seed: int,
    solver: str = "ddim",
    steps: int = 4,
    scale: float = 3.0,
    side: int = 4,
    tokens: int = 77,
    later: str = "",
) -> Job:
    """Return a job; `tokens` are of the lane without the prompt, `later` names what comes after its first stage."""
    table = tabulate(solver, SCHEDULE, steps)
    noise = TorchCpuNoise(seed)
    latents = noise.normal((4, side, side)) * np.float32(table.start)
    states = np.random.default_rng(seed).standard_normal((2, 77, 8), np.float32)
    cond, uncond = ({"encoder_hidden_states": state[:count]} for state, count in zip(states, (77, tokens), strict=True))
    stages = {
        "": (),
        "larger": (Stage(table, uncond, cond, twice, Guidance(scale)),),
        "another": (Stage(table, cond, cond, lambda x, noise: x, Guidance(1.0), cast(Predictor, another)),),
    }
    return Job(table, latents, uncond, cond, noise, Guidance(scale), later=stages[later])


def twice(latents: np.ndarray, noise: NoiseSource) -> np.ndarray:
    large = latents.repeat(2, axis=1).repeat(2, axis=2)
    return large + noise.normal(large.shape)


def another(sample: np.ndarray, timestep: np.ndarray, conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
    return -network(sample, timestep, conditioning)


def alone(job: Job) -> np.ndarray:
    denoiser = Denoiser(HostLanes(network))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    return job.latents


def test_a_job_is_its_table_run_by_hand() -> None:
    job, twin = make(3, "dpmpp-2m"), make(3, "dpmpp-2m")
    latents, memory = twin.latents, np.zeros((4, 4, 4, 4), np.float32)
    for row in twin.table.rows:
        lanes = np.stack([row.c_in * latents] * 2)
        states = np.stack([twin.uncond["encoder_hidden_states"], twin.cond["encoder_hidden_states"]])
        out = network(lanes, np.full(2, row.timestep, np.float32), {"encoder_hidden_states": states})
        latents = advance(row, latents, out[0] + 3.0 * (out[1] - out[0]), memory)
    np.testing.assert_array_equal(alone(job), latents)
    assert job.done


jobs = st.tuples(
    st.integers(0, 50),  # seed
    st.sampled_from(SOLVERS),
    st.integers(1, 6),  # steps
    st.sampled_from([1.0, 3.0]),  # guidance scale
    st.sampled_from([4, 6]),  # side of the latents
    st.sampled_from([77, 33]),  # tokens of the negative prompt
    st.sampled_from(["", "", "larger", "another"]),  # what comes after the first stage
    st.integers(0, 12),  # the tick from which it waits for lanes
)


@settings(max_examples=60, deadline=None)
@given(plan=st.lists(jobs, min_size=1, max_size=7), lanes=st.integers(2, 8))
def test_joining_and_leaving_changes_no_bit(plan: list[tuple[Any, ...]], lanes: int) -> None:
    denoiser = Denoiser(HostLanes(network, lanes))
    waiting = sorted(((arrival, make(*rest)) for *rest, arrival in plan), key=lambda pair: pair[0])
    made = [job for _, job in waiting]
    tick = 0
    while waiting or denoiser.jobs:
        while waiting and waiting[0][0] <= tick and denoiser.fits(waiting[0][1]):
            denoiser.admit(waiting.pop(0)[1])
        assert 0 <= denoiser.free <= lanes
        denoiser.tick()
        tick += 1
    twins = [make(*rest) for *rest, _ in sorted(plan, key=lambda job: job[-1])]
    for job, twin in zip(made, twins, strict=True):
        np.testing.assert_array_equal(job.latents, alone(twin))


def test_guidance_interval_frees_lanes() -> None:
    sizes: list[int] = []

    def counting(sample: np.ndarray, timestep: np.ndarray, conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(sample))
        return network(sample, timestep, conditioning)

    job = make(1)
    job.guidance = Guidance(3.0, interval=(0.25, 0.75))
    denoiser = Denoiser(HostLanes(counting))
    denoiser.admit(job)
    while denoiser.jobs:
        denoiser.tick()
    assert sizes == [1, 2, 2, 1]


def test_texts_of_other_lengths_are_calls_of_their_own() -> None:
    calls: list[tuple[int, int]] = []

    def counting(sample: np.ndarray, timestep: np.ndarray, conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        calls.append(conditioning["encoder_hidden_states"].shape[:2])
        return network(sample, timestep, conditioning)

    job, twin = make(1, tokens=33, steps=1), make(1, tokens=33, steps=1)
    denoiser = Denoiser(HostLanes(counting))
    for each in (job, twin, make(2, steps=1)):
        denoiser.admit(each)
    denoiser.tick()
    assert sorted(calls) == [(2, 33), (2, 77), (2, 77)]
    np.testing.assert_array_equal(job.latents, twin.latents)
    start, row = make(1).latents, job.table.rows[0]
    outs = [
        network(row.c_in * start[None], np.array([row.timestep]), {n: a[None] for n, a in each.items()})[0]
        for each in (job.uncond, job.cond)
    ]
    memory = np.zeros((4, *start.shape), np.float32)
    np.testing.assert_allclose(job.latents, advance(row, start, outs[0] + 3 * (outs[1] - outs[0]), memory), rtol=1e-6)


def test_calls_of_fewer_lanes_and_jobs_that_do_not_move_change_no_bit() -> None:
    sizes: list[int] = []

    def counting(sample: np.ndarray, timestep: np.ndarray, conditioning: Mapping[str, np.ndarray]) -> np.ndarray:
        sizes.append(len(sample))
        return network(sample, timestep, conditioning)

    jobs, other = [make(seed, "euler-ancestral", tokens=33 + 44 * (seed % 2)) for seed in range(3)], make(9, side=8)
    denoiser = Denoiser(HostLanes(counting))
    denoiser.limit_calls(lambda shape: 2 if shape == (4, 4, 4) else 1)
    for job in (*jobs, other):
        denoiser.admit(job)
    assert denoiser.tick([other]) == [other]
    assert (sizes, [job.row for job in jobs]) == ([1, 1], [0, 0, 0])
    sizes.clear()
    denoiser.tick(jobs)
    assert sorted(sizes) == [2, 2, 2]
    while denoiser.jobs:
        denoiser.tick()
    for seed, job in enumerate(jobs):
        np.testing.assert_array_equal(job.latents, alone(make(seed, "euler-ancestral", tokens=33 + 44 * (seed % 2))))
    np.testing.assert_array_equal(other.latents, alone(make(9, side=8)))


def test_a_run_goes_on_in_another_size() -> None:
    job = make(3, later="larger")
    first, noise = make(3), TorchCpuNoise(3)
    noise.normal((4, 4, 4))
    second = replace_latents(make(3), twice(alone(first), noise))
    assert (job.rows, job.moved) == (8, 0)
    np.testing.assert_array_equal(alone(job), alone(second))
    assert (job.rows, job.moved, job.done) == (8, 8, True)


def replace_latents(job: Job, latents: np.ndarray) -> Job:
    return Job(job.table, latents, job.uncond, job.cond, job.noise, job.guidance)


def test_lanes_are_never_overbooked() -> None:
    denoiser = Denoiser(HostLanes(network, 3))
    first, second = make(1), make(2)
    denoiser.admit(first)
    with pytest.raises(RequestError, match="1 of 3 lanes"):
        denoiser.admit(second)
    denoiser.retire(first)
    denoiser.admit(second)
    assert denoiser.jobs == (second,)


def test_a_finished_job_is_not_admitted_again() -> None:
    job = make(1)
    alone(job)
    with pytest.raises(RequestError, match="no rows left"):
        Denoiser(HostLanes(network)).admit(job)


def test_a_job_has_its_lanes_once() -> None:
    denoiser, job = Denoiser(HostLanes(network)), make(1)
    denoiser.admit(job)
    with pytest.raises(RequestError, match="lanes already"):
        denoiser.admit(job)
    denoiser.retire(job)
    denoiser.retire(job)
    assert denoiser.free == denoiser.lanes


def test_a_job_that_turns_nan_fails_alone() -> None:
    sick, healthy = make(1, scale=1.0), make(2)
    sick.cond = {"encoder_hidden_states": np.full((77, 8), np.nan, np.float32)}
    denoiser = Denoiser(HostLanes(network))
    denoiser.admit(sick)
    denoiser.admit(healthy)
    while denoiser.jobs:
        denoiser.tick()
    assert isinstance(sick.error, NetworkError)
    assert "row 1 of 4" in str(sick.error)
    np.testing.assert_array_equal(healthy.latents, alone(make(2)))


def test_previews_end_in_the_picture() -> None:
    job = make(5, "dpmpp-2m", steps=6)
    job.wants_preview = True
    final = alone(job)
    assert job.preview is not None
    np.testing.assert_allclose(job.preview, final, atol=1e-5)  # the last row goes to clean latents
    np.testing.assert_array_equal(job.view, final)


def test_a_new_conditioning_is_never_taken_for_a_dead_one() -> None:
    """Python reuses addresses: lanes are distinguished by the objects, not by their ids."""
    denoiser = Denoiser(HostLanes(network))
    for seed in range(20):
        job = make(seed, steps=1)
        denoiser.admit(job)
        denoiser.tick()
        np.testing.assert_array_equal(job.latents, alone(make(seed, steps=1)))
        del job
