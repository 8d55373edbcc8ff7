"""Whole pictures as one graph, on the emulated GPU, against the same engine in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.command.bench import measure
from latentrt.errors import DeviceMemoryError, NetworkError, RequestError
from latentrt.request import Request
from latentrt.run.gpu.arena import GRAPHS_KEPT
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.sampling.noise import TorchCudaNoise
from latentrt_export.verify.checks import psnr
from tests.support.gpu.host_gpu import HostGpu, Status

SIZE = {"width": 32, "height": 40, "steps": 3}


@pytest.fixture(scope="module")
def gpu() -> Iterator[HostGpu]:
    gpu = HostGpu()
    yield gpu
    assert gpu.in_use == 0
    gpu.close()


def pictures(made: list[Any]) -> np.ndarray:
    return np.stack([np.asarray(picture) for picture in made])


@pytest.mark.parametrize(
    "settings",
    [
        {"solver": "dpmpp-2m"},
        {"solver": "euler-ancestral", "seed": 5},
        {"solver": "euler-ancestral", "seed": 5, "noise": "torch-cuda:t4"},
        {"solver": "ddim", "guidance": 1.0},
        {"solver": "heun", "guidance": 6.0, "guidance_rescale": 0.7, "negative_prompt": "blue"},
        {"solver": "unipc", "guidance_interval": (0.4, 1.0), "count": 3},
        {"solver": "heun", "cache_interval": 3, "guidance_interval": (0.3, 0.7)},
    ],
    ids=str,
)
def test_pictures_are_those_of_numpy(gpu: HostGpu, settings: dict[str, Any]) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as there:
        ours = there(["a red apple", "a cat"], **SIZE, **settings)
    with Engine.load(threads=1, check_hashes=False) as here:
        theirs = here(["a red apple", "a cat"], **SIZE, **settings)
    assert psnr(pictures(ours), pictures(theirs)) > 60
    assert [picture.info for picture in ours] == [picture.info for picture in theirs]


@pytest.mark.parametrize("more", [{}, {"on_tick": lambda job: None}], ids=["one launch", "ticks"])
def test_noise_of_cuda_is_made_on_the_device_alone(
    gpu: HostGpu, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    settings = {**SIZE, "solver": "euler-ancestral", "noise": "torch-cuda:t4"}
    with Engine.load(threads=1, check_hashes=False) as here:
        theirs = here("a cat", **settings)
    monkeypatch.delattr(TorchCudaNoise, "normal")
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
        assert psnr(pictures(there("a cat", **settings, **more)), pictures(theirs)) > 60


@pytest.mark.parametrize("noise", ["torch-cpu", "torch-cuda:t4"])
@pytest.mark.parametrize("solver", ["ddim", "dpm2-ancestral", "unipc"])
def test_pictures_on_pictures_are_those_of_numpy(gpu: HostGpu, solver: str, noise: str) -> None:
    """From noise, on a picture, and keeping a part of it: one canvas and its graphs serve all three in turn."""
    y, x = np.mgrid[:40, :32]
    image = np.stack([6 * y, 7 * x, 255 - 4 * y], axis=-1).astype(np.uint8)
    asked = {**SIZE, "steps": 4, "solver": solver, "noise": noise, "strength": 0.8}
    with (
        Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as there,
        Engine.load(threads=1, check_hashes=False) as here,
    ):
        for more in ({}, {"mask": x > 12}, {}):
            ours, theirs = (sd(["a red apple", "a cat"], image=image, **asked, **more) for sd in (there, here))
            assert psnr(pictures(ours), pictures(theirs)) > 60
            assert [picture.info for picture in ours] == [picture.info for picture in theirs]
        ticked = there(["a red apple", "a cat"], image=image, **asked, on_tick=lambda job: None)
    assert psnr(pictures(ours), pictures(ticked)) > 60


def test_sdxl_concatenates_texts_and_zeroes_the_negative_one(
    gpu: HostGpu, exported: Callable[[str], tuple[Path, Path]]
) -> None:
    _, bundle = exported("sdxl")
    for more in ({}, {"negative_prompt": "a"}):
        with Engine.load(bundle, backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as there:
            ours = there("a cat", steps=2, **more)
        with Engine.load(bundle, threads=1, check_hashes=False) as here:
            theirs = here("a cat", steps=2, **more)
        assert psnr(pictures(ours), pictures(theirs)) > 60


@pytest.mark.parametrize(("precision", "least"), [("fp32", 60), ("fp16", 40)])
def test_a_tiny_vae_and_tiles(
    gpu: HostGpu,
    exported: Callable[[str], tuple[Path, Path]],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    least: float,
) -> None:
    """One launch as large as a tile; beyond it ticks, since a graph of the whole picture has no tiles."""
    _, bundle = exported("tiny-vae")
    backend = OrtBackend(threads=1, gpu=gpu, precision=precision)
    with (
        Engine.load(bundle, backend=backend, check_hashes=False, tile=16) as there,
        Engine.load(bundle, threads=1, check_hashes=False, tile=16) as here,
    ):
        drawn, program = list[int](), there._program
        assert program is not None
        draw = program.draw
        monkeypatch.setattr(program, "draw", lambda jobs: drawn.append(jobs[0].latents.shape[1]) or draw(jobs))
        for size in (16, 32):
            asked = {"steps": 2, "seed": 3, "width": size, "height": size}
            ours = there("a cat", **asked)
            assert drawn == [8]
            assert psnr(pictures(ours), pictures(here("a cat", **asked))) > least


def test_half_graphs_draw_nearly_the_same(gpu: HostGpu) -> None:
    backend = OrtBackend(threads=1, gpu=gpu, precision="fp16")
    with Engine.load(backend=backend, check_hashes=False) as there:
        ours = there("a red apple", steps=4)
    with Engine.load(threads=1, check_hashes=False) as here:
        theirs = here("a red apple", steps=4)
    assert psnr(pictures(ours), pictures(theirs)) > 40


def test_a_captured_picture_is_the_queued_one(gpu: HostGpu) -> None:
    made = []
    for capture in (True, False):
        backend = OrtBackend(threads=1, gpu=gpu)
        with Engine.load(backend=backend, capture=capture, check_hashes=False) as engine:
            made.append(pictures(engine(["a", "a dog"], **SIZE, solver="dpmpp-3m-sde")))
    np.testing.assert_array_equal(*made)


def test_one_picture_is_one_launch(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), capture=True, check_hashes=False) as engine:
        engine("a", **SIZE)
        before = len(gpu.host.calls)
        engine("a red car", **SIZE, solver="ddim", guidance=5.0, seed=9)
        calls = gpu.host.calls[before:]
    assert calls.count("cuGraphLaunch") == 1
    assert "cuLaunchKernel" not in calls
    assert calls.count("cuMemcpyDtoHAsync") == 1
    launch = calls.index("cuGraphLaunch")
    assert set(calls[launch + 1 :]) <= {"cuMemcpyDtoHAsync", "cuStreamSynchronize", "cuCtxSetCurrent"}


def test_a_tick_and_one_launch_agree(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as engine:
        whole = pictures(engine("a red apple", **SIZE))
        ticked = pictures(engine("a red apple", **SIZE, on_tick=lambda job: None))
    assert psnr(whole, ticked) > 60


def test_kinds_of_pictures_are_kept_and_the_oldest_makes_place(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as engine:
        for width in (16, 24, 32, 40, 48):
            engine("a", width=width, height=16, steps=1)
        five = gpu.in_use
        engine("a", width=16, height=16, steps=2)  # drawn anew, in place of 24 x 16
        assert gpu.in_use < five


def test_what_cannot_be_drawn_is_said(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=1, check_hashes=False) as engine:
        with pytest.raises(RequestError, match="lanes=2"):
            engine("a", **SIZE)
        with pytest.raises(RequestError, match="lanes=2"):
            engine("a", **SIZE, on_tick=lambda job: None)
        assert len(engine("a", **SIZE, guidance=1.0)) == 1


def test_numbers_that_are_not_finite_are_an_error(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as engine:
        jobs = engine.jobs(Request(prompt="a", **SIZE), tokens=True)
        jobs[0].latents[0, 0, 0] = np.nan
        assert engine._program is not None
        with pytest.raises(NetworkError, match="after row 1 of 3"):
            engine._program.draw(jobs)


def test_bench_measures_a_device(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), lanes=4, check_hashes=False) as engine:
        result = measure(engine, [1, 2], steps=1, repeats=1)
    assert [row["batch"] for row in result["batches"]] == [1, 2]
    assert all(row["host_percent"] is None and row["images_per_second"] > 0 for row in result["batches"])


def test_graphs_are_kept_within_bounds(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), capture=True, check_hashes=False) as engine:
        before = gpu.host.calls.count("cuGraphInstantiate")
        assert gpu.host.alive["executable"] == 0
        for steps in range(1, GRAPHS_KEPT + 4):
            engine("a", width=16, height=16, steps=steps)
        assert gpu.host.alive["executable"] == GRAPHS_KEPT
        engine("a", width=16, height=16, steps=GRAPHS_KEPT + 3)  # the newest is still there
        assert gpu.host.calls.count("cuGraphInstantiate") == before + GRAPHS_KEPT + 3


def test_graphs_make_place_where_there_is_no_memory_for_another(gpu: HostGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = gpu.host.cuGraphInstantiate, 2

    def instantiate(graph: int, flags: int) -> tuple[Any, ...]:
        if gpu.host.alive["executable"] >= room:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, None
        return real(graph, flags)

    monkeypatch.setattr(gpu.host, "cuGraphInstantiate", instantiate, raising=False)
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), capture=True, check_hashes=False) as engine:
        first = pictures(engine("a", width=16, height=16, steps=1))
        for steps in (2, 3):
            engine("a", width=16, height=16, steps=steps)
        assert gpu.host.alive["executable"] == 1
        np.testing.assert_array_equal(pictures(engine("a", width=16, height=16, steps=1)), first)
        room = 0
        with pytest.raises(DeviceMemoryError):
            engine("a", width=16, height=16, steps=4)
    assert gpu.host.alive["graph"] == 0


def test_capture_is_asked_for_where_a_backend_does_not_promise_it(gpu: HostGpu) -> None:
    with Engine.load(backend=OrtBackend(threads=1, gpu=gpu), check_hashes=False) as engine:
        first = len(gpu.host.calls)
        engine("a", **SIZE)
        assert "cuGraphLaunch" not in gpu.host.calls[first:]
