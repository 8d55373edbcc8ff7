"""Rows that use deep features again: against diffusers with the same substitution, alone and in company."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt import Engine
from latentrt.bundle.spec import SHALLOW
from latentrt.errors import RequestError
from latentrt.request import Request
from latentrt.run.denoiser import Denoiser
from latentrt.run.job import Job
from latentrt.run.lanes import open_lanes
from latentrt.run.make import make_jobs
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.graphs.to_onnx import quiet
from tests.support.gpu.host_gpu import HostGpu

SIZE = {"height": 32, "width": 32}
ASKED: list[dict[str, Any]] = [
    {"steps": 5},
    {"steps": 6, "cache_interval": 2, "solver": "heun"},
    {"steps": 7, "cache_interval": 3, "solver": "euler-ancestral", "seed": 3},
    {"steps": 4, "cache_interval": 3, "guidance": 1.0, "solver": "pndm"},
    {"steps": 8, "cache_interval": 4, "guidance_interval": (0.3, 0.8)},
]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine.load(threads=1, check_hashes=False) as engine:
        yield engine


def jobs(engine: Engine, *asked: dict[str, Any]) -> list[Job]:
    settings = ({**SIZE, **each} for each in asked)
    return [job for each in settings for job in make_jobs(engine.model, Request(prompt="a red apple", **each))]


def as_diffusers(checkpoint: Path, interval: int, steps: int, guidance: float) -> np.ndarray:
    """Draw with diffusers; between full calls, what comes up to the last layer is that of the last one."""
    with quiet():
        pipe = StableDiffusionPipeline.from_pretrained(checkpoint, safety_checker=None, feature_extractor=None)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    skip, calls, kept = pipe.unet.config.block_out_channels[0], 0, torch.empty(0)

    def substitute(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal calls, kept
        joined, *rest = arguments
        if calls % interval == 0:
            kept = joined[:, :-skip].clone()
        calls += 1
        return torch.cat([kept, joined[:, -skip:]], 1), *rest

    pipe.unet.up_blocks[-1].resnets[-1].register_forward_pre_hook(substitute)
    generator = torch.Generator().manual_seed(7)
    made = pipe("a cat", num_inference_steps=steps, guidance_scale=guidance, generator=generator, output_type="latent")
    return np.asarray(made.images[0])


@pytest.mark.parametrize(("interval", "guidance"), [(1, 5.0), (2, 5.0), (3, 1.0), (5, 5.0)])
def test_latents_are_those_of_diffusers_with_the_same_features(
    exported: Callable[[str], tuple[Path, Path]], interval: int, guidance: float
) -> None:
    checkpoint, bundle = exported("sd")
    theirs = as_diffusers(checkpoint, interval, 6, guidance)
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        (job,) = engine.requests(
            ["a cat"], {"steps": 6, "seed": 7, "solver": "ddim", "guidance": guidance, "cache_interval": interval}
        )
        engine.run([job])
    assert np.linalg.norm(job.latents - theirs) < 2e-5 * np.linalg.norm(theirs)


def test_rows_between_are_shallow_and_change_the_picture(engine: Engine) -> None:
    whole, second, fourth = jobs(engine, *({"steps": 8, "cache_interval": interval} for interval in (1, 2, 4)))
    assert (whole.table.shallow, second.table.shallow) == ((), (False, True) * 4)
    assert fourth.table.shallow == (False, True, True, True) * 2
    calls: dict[str, int] = {}
    for name in ("unet", "unet_shallow"):
        network = engine.model.networks[name].open()
        calls[name] = 0
        _count(engine, name, network, calls)
    engine.run([whole, second, fourth])
    assert calls == {"unet": 8, "unet_shallow": 6}
    distances = [
        np.linalg.norm(job.latents - whole.latents) / np.linalg.norm(whole.latents) for job in (second, fourth)
    ]
    assert 1e-4 < distances[0] < distances[1] < 0.5
    assert "cache_interval" not in whole.tag
    assert fourth.tag["cache_interval"] == 4


def _count(engine: Engine, name: str, network: Any, calls: dict[str, int]) -> None:
    lazy, load = engine.model.networks[name], network.__class__

    class Counting(load):  # type: ignore[misc, valid-type]
        def __call__(self, feeds: Any) -> Any:
            calls[name] += 1
            return super().__call__(feeds)

    counting = Counting.__new__(Counting)
    counting.__dict__.update(network.__dict__)
    lazy._network = counting


def test_rows_where_guidance_sets_in_are_full(engine: Engine) -> None:
    """The lane without the prompt has no features yet."""
    (job,) = jobs(engine, {"steps": 10, "cache_interval": 4, "guidance_interval": (0.5, 0.8)})
    full = [row for row, shallow in enumerate(job.table.shallow) if not shallow]
    assert full == [0, 4, 5, 8]


@given(st.permutations(range(len(ASKED))), st.lists(st.integers(0, 3), min_size=5, max_size=5))
@settings(max_examples=8, deadline=None)
def test_a_job_is_the_one_it_is_alone(engine: Engine, order: list[int], waits: list[int]) -> None:
    """Full and shallow rows of jobs of all ages, in and out of a shared batch: to the bit."""
    alone, together = jobs(engine, *ASKED), jobs(engine, *ASKED)
    for job in alone:
        engine.run([job])
    waiting = [(waits[place], together[index]) for place, index in enumerate(order)]
    while waiting or engine.denoiser.jobs:
        for wait, job in list(waiting):
            if wait == 0:
                engine.denoiser.admit(job)
        waiting = [(wait - 1, job) for wait, job in waiting if wait]
        engine.denoiser.tick()
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one.latents, other.latents)


@pytest.mark.parametrize("capture", [True, False], ids=["captured", "queued"])
def test_ticks_on_a_device_are_those_of_numpy(engine: Engine, capture: bool) -> None:
    here, there, alone = jobs(engine, *ASKED), jobs(engine, *ASKED), jobs(engine, *ASKED)
    engine.run(here)
    gpu = HostGpu()
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=10, check_hashes=False) as on_device:
        lanes, _ = open_lanes(on_device.model, on_device.backend, 10, capture)
        Denoiser(lanes).run(there)
        for job in alone:
            Denoiser(lanes).run([job])
        lanes.close()
    assert gpu.in_use == 0
    gpu.close()
    for job, other, wanted in zip(there, alone, here, strict=True):
        np.testing.assert_array_equal(job.latents, other.latents)
        np.testing.assert_allclose(job.latents, wanted.latents, atol=1e-4 * np.abs(wanted.latents).max())


def test_a_bundle_without_the_shallow_graph_says_so(engine: Engine) -> None:
    bundle = engine.bundle
    networks = {name: network for name, network in bundle.spec.networks.items() if network.role != SHALLOW}
    older = replace(bundle, spec=replace(bundle.spec, networks=networks))
    with Engine(older, OrtBackend(threads=1)) as engine, pytest.raises(RequestError, match="no shallow graph"):
        engine("a red apple", cache_interval=2)
