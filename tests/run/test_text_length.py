"""Texts of any length: a picture whose two lanes read texts of different lengths, against torch's UNet lane by lane."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from latentrt import Engine
from latentrt.model.inputs import Sides
from latentrt.run.job import Job
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.guidance import Guidance
from latentrt.sampling.noise import TorchCpuNoise
from latentrt.sampling.table import advance, tabulate
from latentrt_export.graphs.to_onnx import quiet
from latentrt_export.verify.checks import difference
from tests.support.gpu.host_gpu import HostGpu

Exported = Callable[[str], tuple[Path, Path]]
BOUND = 1e-5


def job_of(engine: Engine, chunks: int, interval: tuple[float, float] = (0.0, 1.0), *, cached: bool = False) -> Job:
    """Return a job whose prompt has so many chunks of 77 tokens, and its negative prompt one."""
    assert engine.model.text is not None
    cond, uncond = (engine.model.text.encode(text)["encoder_hidden_states"] for text in ("a cat", "b"))
    states = {"encoder_hidden_states": uncond}, {"encoder_hidden_states": np.concatenate([cond, uncond, cond][:chunks])}
    sides, noise = engine.model.hoisted(Sides(*states)), TorchCpuNoise(3)
    table = tabulate("ddim", engine.schedule, 4)
    if cached:
        object.__setattr__(table, "shallow", (False, True, False, True))
    return Job(table, noise.normal((4, 8, 6)), *sides.lanes(2), noise, Guidance(3.0, interval=interval))


def by_torch(folder: Path, engine: Engine, job: Job, chunks: int) -> np.ndarray:
    assert engine.model.text is not None
    cond, uncond = (engine.model.text.encode(text)["encoder_hidden_states"] for text in ("a cat", "b"))
    with quiet():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    x, memory = job.latents, np.zeros((4, *job.latents.shape), np.float32)
    for row in job.table.rows:
        with torch.no_grad():
            outs = [
                unet(torch.from_numpy(row.c_in * x[None]), row.timestep, torch.from_numpy(states[None])).sample[0]
                for states in (uncond, np.concatenate([cond, uncond, cond][:chunks]))
            ]
        x = advance(row, x, job.guidance.combine(outs[0].numpy(), outs[1].numpy()), memory)
    return x


@pytest.mark.parametrize("chunks", [2, 3])
def test_the_lanes_of_a_picture_may_read_texts_of_different_lengths(exported: Exported, chunks: int) -> None:
    source, bundle = exported("sd")
    with Engine.load(bundle, threads=1, check_hashes=False) as engine:
        job, company, plain = job_of(engine, chunks), job_of(engine, chunks), job_of(engine, 1)
        expected = by_torch(source, engine, job, chunks)
        alone = job_of(engine, 1)
        engine.run([alone])
        engine.run([job, plain, company])
    assert difference(job.latents, expected) < BOUND
    np.testing.assert_array_equal(job.latents, company.latents)
    np.testing.assert_array_equal(plain.latents, alone.latents)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.8)])
def test_on_a_device_too(exported: Exported, interval: tuple[float, float], cached: bool) -> None:
    _, bundle = exported("sd")
    if cached and interval[0]:
        pytest.skip("the row where guidance sets in has to be full")
    gpu = HostGpu()
    with (
        Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as there,
        Engine.load(bundle, threads=1, check_hashes=False) as here,
    ):
        for chunks in (2, 1):
            ours, theirs = (
                [job_of(engine, chunks, interval, cached=cached) for _ in range(2)] for engine in (there, here)
            )
            there.run(ours)
            here.run(theirs)
            assert max(difference(a.latents, b.latents) for a, b in zip(ours, theirs, strict=True)) < BOUND
    assert gpu.in_use == 0
    gpu.close()
