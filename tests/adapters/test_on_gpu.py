"""LoRAs of each request on the emulated GPU: as numpy's lanes with float32 graphs, and with CUDA's own graphs.

The latter are interpreted node by node, in half precision, as ONNX Runtime's CUDA provider would run them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentrt import Engine
from latentrt.adapters.mixed import balanced
from latentrt.bundle.bundle import EMBEDDED, Bundle
from latentrt.bundle.spec import LORA
from latentrt.errors import AdapterError, DeviceMemoryError
from latentrt.model.conditioners.adapters import Adapters
from latentrt.run.job import Job
from latentrt.runtime.base import Backend
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt_export.verify.checks import psnr
from tests.adapters.test_mixed import SETTINGS, drawn
from tests.support.gpu.host_gpu import HostGpu, host_gpu, view
from tests.support.gpu.interpreted import InterpretedBackend

Exported = Callable[[str], tuple[Path, Path]]
Library = Callable[[str], Path]
ASKED: tuple[Mapping[str, Any], ...] = ({}, {"a": 0.5}, {"b": 0.5, "a": (0.2, 0.4)})
HALF_BOUND = 45  # dB, of pictures in half precision and those of a CPU in float32 with the same LoRAs merged


def jobs_of(engine: Engine, asked: tuple[Mapping[str, Any], ...] = ASKED, **more: Any) -> list[Job]:
    settings = SETTINGS | {"steps": 3} | more
    return [engine.requests(["a cat"], settings | {"lora": lora, "seed": n})[0] for n, lora in enumerate(asked)]


def run(engine: Engine, jobs: list[Job]) -> list[np.ndarray]:
    engine.run(jobs)
    return [job.latents for job in jobs]


@contextmanager
def loaded(bundle: Path, make: Callable[[HostGpu], Backend], **loading: Any) -> Iterator[Engine]:
    with host_gpu() as gpu, Engine.load(bundle, backend=make(gpu), lanes=6, check_hashes=False, **loading) as engine:
        yield engine


def test_as_on_the_host(taking: Exported, library: Library) -> None:
    """In one batch, with none, one and two LoRAs."""
    bundle, loading = taking("sd")[1], {"adapters": library("sd"), "adapter_rank": 9}
    with Engine.load(bundle, threads=1, cache=False, **loading) as here:
        expected = run(here, jobs_of(here))
    with loaded(bundle, lambda gpu: OrtBackend(threads=1, gpu=gpu), **loading) as there:
        ours = run(there, jobs_of(there))
    for a, b in zip(ours, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(ours[0] - ours[1]).max() > 0.1


@pytest.mark.parametrize("family", ["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_the_cuda_graphs(taking: Exported, library: Library, family: str) -> None:
    """Each picture of a batch is the one that is made alone, and near the merged one; without LoRAs the plain one."""
    bundle, folder = taking(family)[1], library(family)
    with loaded(bundle, InterpretedBackend, adapters=folder, adapter_rank=9) as there:
        jobs = jobs_of(there)
        together = run(there, jobs)
        pictures = [np.asarray(picture) for picture in there.pictures(jobs)]
        for latents, alone in zip(together, jobs_of(there), strict=True):
            np.testing.assert_array_equal(latents, run(there, [alone])[0])
        np.testing.assert_array_equal(pictures[1], drawn(there, lora=ASKED[1], steps=3, seed=1))
    with loaded(bundle, InterpretedBackend) as plain:
        np.testing.assert_array_equal(together[0], run(plain, jobs_of(plain, ({},)))[0])
    for number, lora in enumerate(ASKED[1:], 1):
        merged = {folder / f"{name}.safetensors": strength for name, strength in lora.items()}
        with Engine.load(bundle, threads=1, cache=False, lora=merged) as here:
            assert psnr(pictures[number], drawn(here, steps=3, seed=number)) > HALF_BOUND
            assert psnr(pictures[0], drawn(here, steps=3, seed=number)) < 40


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_in_one_launch(taking: Exported, library: Library, family: str) -> None:
    """Texts, rows and pictures, with other LoRAs and with none in turn."""
    bundle, loading = taking(family)[1], {"adapters": library(family), "adapter_rank": 9}
    with (
        Engine.load(bundle, threads=1, cache=False, **loading) as here,
        loaded(bundle, lambda gpu: OrtBackend(threads=1, gpu=gpu), capture=True, **loading) as there,
    ):
        gpu: Any = there.backend.gpu
        for lora in (ASKED[2], {}, ASKED[1]):
            before = len(gpu.host.calls)
            ours = drawn(there, lora=lora, steps=2)
            assert gpu.host.calls[before:].count("cuGraphLaunch") == 1
            assert psnr(ours, drawn(here, lora=lora, steps=2)) > 60


def test_lanes_without_a_job_have_zeros(taking: Exported, library: Library) -> None:
    """LoRAs are copied when their job is admitted, and only what is not zero."""
    bundle, folder = taking("sd")[1], library("sd")
    with loaded(bundle, lambda gpu: OrtBackend(threads=1, gpu=gpu), adapters=folder, adapter_rank=9) as engine:
        gpu: Any = engine.backend.gpu
        first, second, other = jobs_of(engine)

        def copies(work: Callable[..., object], *arguments: Any) -> int:
            before = gpu.host.calls.count("cuMemcpyHtoDAsync")
            work(*arguments)
            return int(gpu.host.calls.count("cuMemcpyHtoDAsync")) - before

        plain = copies(engine.denoiser.admit, first)
        changed = [name for name, array in second.cond.items() if name.startswith(LORA) and any(array.strides)]
        assert copies(engine.denoiser.admit, second) == plain + 2 * len(changed)
        assert 0 < len(changed) < sum(name.startswith(LORA) for name in second.cond)
        (room,) = engine._lanes._rooms._values.values()  # type: ignore[attr-defined]
        arrays = {name: view(array) for name, array in room._arena.inputs.items() if name.startswith(LORA)}
        assert all(arrays[name][2:4].any() for name in changed)
        assert not any(array[:2].any() or array[4:].any() for array in arrays.values())
        assert copies(engine.denoiser.tick) == 0
        engine.denoiser.retire(second)
        assert not any(array.any() for array in arrays.values())
        engine.denoiser.admit(other)
        assert any(array[2:4].any() for array in arrays.values())
        engine.denoiser.retire(other)
        engine.denoiser.retire(first)


def test_with_controlnets(taking: Exported, exported: Exported, library: Library) -> None:
    """Jobs with a LoRA, a ControlNet, both and none are those of the host."""
    edges, bundle = np.eye(32, dtype=np.uint8) * 255, taking("sd")[1]
    loading: dict[str, Any] = {"control": {"edges": exported("control-sd-1")[1]}, "adapters": library("sd")}
    asked = [{"lora": lora, "control": control} for control in ({}, {"edges": edges}) for lora in ASKED[:2]]

    def latents(engine: Engine) -> list[np.ndarray]:
        return run(engine, [engine.requests(["a cat"], SETTINGS | {"steps": 2} | own)[0] for own in asked])

    with Engine.load(bundle, threads=1, cache=False, adapter_rank=9, **loading) as here:
        expected = latents(here)
    with loaded(bundle, lambda gpu: OrtBackend(threads=1, gpu=gpu), adapter_rank=9, **loading) as there:
        ours = latents(there)
    for number, (a, b) in enumerate(zip(ours, expected, strict=True)):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert all(np.abs(a - other).max() > 0.01 for other in ours[:number])


def test_the_cuda_graphs_with_a_controlnet() -> None:
    """Of the embedded model, with its own LoRAs and ControlNet."""
    loading: dict[str, Any] = {"adapters": {"ink": "emoji-ink"}, "adapter_rank": 8, "control": {"grey": "emoji-grey"}}
    settings, grey = (
        {"steps": 2, "guidance": 1.0, "height": 32, "width": 32},
        {"grey": np.eye(32, dtype=np.uint8) * 255},
    )
    asked = [{"lora": lora, "control": control} for control in ({}, grey) for lora in ({}, {"ink": 0.8})]

    def pictures(engine: Engine) -> list[np.ndarray]:
        jobs = [engine.requests(["a red apple"], settings | own)[0] for own in asked]
        engine.run(jobs)
        return [np.asarray(picture) for picture in engine.pictures(jobs)]

    with Engine.load(threads=1, cache=False, check_hashes=False, **loading) as here:
        expected = pictures(here)
    with loaded(EMBEDDED, InterpretedBackend, **loading) as there:
        ours = pictures(there)
    assert min(psnr(a, b) for a, b in zip(ours, expected, strict=True)) > HALF_BOUND
    assert max(psnr(ours[3], other) for other in ours[:3]) < 30


def test_what_is_refused(taking: Exported, library: Library, tmp_path: Path) -> None:
    bundle, folder = Bundle.open(taking("sd")[1], check_hashes=False), library("sd")
    with host_gpu(memory=2**24) as gpu, pytest.raises(DeviceMemoryError, match=r"rank 900 in 6 lanes take 39 MiB"):
        Engine(bundle, InterpretedBackend(gpu), lanes=6, adapters=Adapters.of(folder, 900))
    networks = {
        name: replace(one, variants={key: each for key, each in one.variants.items() if key != "fp16-ort-cuda+lora"})
        for name, one in bundle.spec.networks.items()
    }
    older = replace(bundle, spec=replace(bundle.spec, networks=networks))
    with (
        host_gpu() as gpu,
        pytest.raises(AdapterError, match=r"takes LoRAs .* in fp32, fp16.*: fp16-ort-cuda.*--adapters"),
    ):
        Engine(older, InterpretedBackend(gpu), adapters=Adapters.of(folder))


def test_factors_are_balanced_for_half_precision() -> None:
    """A small alpha leaves numbers that float16 would not hold; the product stays to the bit in float32."""
    random = np.random.default_rng(3)
    down, up = random.standard_normal((64, 4), np.float32), 3e-8 * random.standard_normal((4, 48), np.float32)
    x, before = random.standard_normal((9, 64), np.float32), up.astype(np.float16).astype(np.float32)
    a, b = balanced(down, up)
    np.testing.assert_array_equal((x @ a) @ b, (x @ down) @ up)
    halves = [factor.astype(np.float16).astype(np.float32) for factor in (a, b)]
    expected = down @ up
    assert np.abs(halves[0] @ halves[1] - expected).max() < 2e-3 * np.abs(expected).max()
    assert np.abs(down @ before - expected).max() > 0.1 * np.abs(expected).max()
    for factor in (np.zeros((64, 4), np.float32), down):
        np.testing.assert_array_equal(balanced(factor, np.zeros_like(up))[1], 0)
