"""`Gpu` over a driver in host memory: opening, closing, and its errors for the driver's."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt.cuda.driver import Driver
from latentrt.cuda.gpu import Gpu
from latentrt.cuda.kernels import KERNELS
from latentrt.errors import BackendError, MissingDependencyError
from tests.support.gpu.host_gpu import HostDriver, HostGpu, Status, normal_arguments


def cuda(device: str = "cuda", code: Callable[[Any], bytes] = lambda _: b"", **options: Any) -> tuple[Gpu, HostDriver]:
    driver = HostDriver(**options)
    return Gpu(device, driver, code), driver


def test_a_device_is_opened_and_closed() -> None:
    gpu, driver = cuda(version=12080)
    assert (gpu.name, gpu.ordinal, gpu.compute_capability, gpu.driver) == ("Host GPU", 0, (9, 0), "12.8")
    assert gpu.stream > 0
    opening = [name for name in driver.calls if name not in ("cuCtxSetCurrent", "cuDeviceGetAttribute")]
    assert opening[:6] == [
        *("cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName"),
        "cuDevicePrimaryCtxRetain",
    ]
    assert opening[6:] == ["cuStreamCreate", "cuModuleLoadData", *["cuModuleGetFunction"] * len(KERNELS)]
    driver.calls.clear()
    gpu.close()
    gpu.close()
    closing = [name for name in driver.calls if name != "cuCtxSetCurrent"]
    assert closing == ["cuStreamSynchronize", "cuModuleUnload", "cuStreamDestroy", "cuDevicePrimaryCtxRelease"]
    assert not any(driver.alive.values())


def test_the_kernels_are_compiled_for_the_device() -> None:
    asked = []
    gpu, _ = cuda("cuda:1", lambda capability: asked.append(capability) or b"", devices=2)
    assert asked == [(9, 0)]
    assert gpu.ordinal == 1
    gpu.close()


@pytest.mark.parametrize("device", ["cuda:2", "cuda:-1", "cuda:", "gpu", "cuda:1x", ""])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(BackendError, match="cuda:0, cuda:1"):
        cuda(device, devices=2)


def test_no_gpu() -> None:
    with pytest.raises(BackendError, match=r"CUDA_ERROR_NO_DEVICE.*--gpus all"):
        cuda(devices=0)


def test_a_driver_that_is_too_old() -> None:
    with pytest.raises(BackendError, match=r"CUDA 11\.8.*CUDA 12\.0.*install NVIDIA's driver, 580 or newer"):
        cuda(version=11080)


def test_no_driver_or_one_without_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(self: HostDriver, flags: int) -> None:
        raise RuntimeError("libcuda.so.1 cannot be opened")

    monkeypatch.setattr(HostDriver, "cuInit", missing)
    with pytest.raises(BackendError, match=r"libcuda\.so\.1 cannot be opened.*580 or newer"):
        cuda()


def test_no_bindings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingDependencyError, match=re.escape("pip install 'latentrt[cuda]'")):
        Gpu()


@pytest.mark.parametrize("function", ["cuStreamCreate", "cuModuleLoadData", "cuModuleGetFunction"])
def test_a_beginning_that_fails_leaves_nothing_behind(function: str) -> None:
    driver = HostDriver()
    driver.failing[function] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(BackendError, match=f"{function} says CUDA_ERROR_INVALID_IMAGE"):
        Gpu("cuda", driver, lambda _: b"")
    assert not any(driver.alive.values())


def test_kernels_that_are_too_new_for_the_driver() -> None:
    driver = HostDriver(version=12040)
    driver.failing["cuModuleLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(BackendError, match=r"CUDA 12\.4\) does not take the kernels.*nvidia-cuda-nvrtc-cu12"):
        Gpu("cuda", driver, lambda _: b"")


def test_what_is_still_held_is_freed_at_the_end() -> None:
    gpu, driver = cuda()
    array = gpu.zeros((5, 6), np.float32)
    mark = gpu.mark()
    gpu.close()
    assert driver.in_use == 0
    assert not any(driver.alive.values())
    gpu.free(array)
    with pytest.raises(BackendError, match="closed"):
        gpu.wait_for(mark)


def test_a_context_that_is_lost_is_given_back_all_the_same() -> None:
    gpu, driver = cuda()
    for function in ("cuStreamSynchronize", "cuModuleUnload", "cuStreamDestroy"):
        driver.failing[function] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match=r"ILLEGAL_ADDRESS.*start the process again"):
        gpu.close()
    assert driver.alive["context"] == 0
    gpu.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda gpu: gpu.empty((1,), np.float32),
        lambda gpu: gpu.wait(),
        lambda gpu: gpu.memory(),
        lambda gpu: gpu.call(lambda: None),
        lambda gpu: gpu.mark(),
    ],
)
def test_a_closed_device_is_refused(use: Callable[[Gpu], Any]) -> None:
    gpu, _ = cuda()
    gpu.close()
    with pytest.raises(BackendError, match="the GPU was closed"):
        use(gpu)


def test_the_context_is_made_current_before_every_call(gpu: HostGpu) -> None:
    """Another library, or another device in the same thread, may have changed it."""
    gpu.host.calls.clear()
    gpu.free(gpu.zeros((3,), np.float32))
    assert gpu.host.calls[0::2] == ["cuCtxSetCurrent"] * 3
    assert gpu.host.calls[1::2] == ["cuMemAlloc", "cuMemsetD8Async", "cuMemFree"]


# ---- Errors


@pytest.mark.parametrize(
    ("function", "use"),
    [
        ("cuMemAlloc", lambda gpu, array: gpu.empty((1,), np.float32)),
        ("cuMemFree", lambda gpu, array: gpu.free(array)),
        ("cuMemcpyHtoDAsync", lambda gpu, array: gpu.upload(np.zeros(4, np.float32), array)),
        ("cuMemcpyDtoHAsync", lambda gpu, array: gpu.download(array)),
        ("cuMemcpyDtoDAsync", lambda gpu, array: gpu.copy(array, array)),
        ("cuMemsetD8Async", lambda gpu, array: gpu.fill_zero(array)),
        ("cuStreamSynchronize", lambda gpu, array: gpu.wait()),
        ("cuLaunchKernel", lambda gpu, array: gpu.launch("normal", (1, 1), 32, normal_arguments(array))),
        ("cuCtxSetCurrent", lambda gpu, array: gpu.memory()),
        ("cuEventRecord", lambda gpu, array: gpu.mark()),
    ],
)
def test_every_error_is_told(gpu: HostGpu, function: str, use: Callable[[Gpu, Any], Any]) -> None:
    array = gpu.zeros((4,), np.float32)
    gpu.host.failing[function] = Status.CUDA_ERROR_ILLEGAL_ADDRESS
    with pytest.raises(BackendError, match=f"{function} says CUDA_ERROR_ILLEGAL_ADDRESS"):
        use(gpu, array)
    gpu.host.failing.clear()
    gpu.free(array)


def test_a_launch_of_nothing(gpu: HostGpu) -> None:
    array = gpu.zeros((4,), np.float32)
    with pytest.raises(BackendError, match="INVALID_VALUE"):
        gpu.launch("normal", (0, 1), 32, normal_arguments(array))
    gpu.free(array)


# ---- Time


def test_marks_take_turns_with_few_events(gpu: HostGpu) -> None:
    for _ in range(5):
        mark = gpu.mark()
        gpu.wait_for(mark)
        del mark
    assert gpu.host.alive["event"] == 1
    start, end = gpu.mark(), gpu.mark()
    assert gpu.host.alive["event"] == 2
    assert gpu.milliseconds(start, end) == pytest.approx(abs(end.event - start.event))


def test_a_driver_needs_no_device() -> None:
    driver = Driver(HostDriver(version=13010))
    assert driver.version == "13.1"
    assert driver.context is None
