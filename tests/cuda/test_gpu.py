"""`Cuda` over a driver in host memory: what it asks of the driver, in which order, and what it makes of its errors."""

from __future__ import annotations

import ctypes
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.cuda.driver import Driver
from latentrt.cuda.gpu import Cuda
from latentrt.cuda.kernels import KERNELS
from latentrt.errors import BackendError, DeviceMemoryError, MissingDependencyError
from tests.support.gpu.host_gpu import HostDriver, HostGpu, Status, host_gpu, view


@pytest.fixture
def gpu() -> Iterator[HostGpu]:
    with host_gpu() as gpu:
        yield gpu


def cuda(device: str = "cuda", code: Callable[[Any], bytes] = lambda _: b"", **options: Any) -> tuple[Cuda, HostDriver]:
    driver = HostDriver(**options)
    return Cuda(device, driver, code), driver


def fill(array: Any, value: float) -> None:
    view(array)[:] = value


# ---- The stand-in is like the real one


def test_the_driver_of_the_tests_has_the_signatures_of_the_bindings() -> None:
    """Those of the installed cuda-bindings, as their docstrings begin: `cuMemFree(dptr)`."""
    real = pytest.importorskip("cuda.bindings.driver")
    functions = [name for name in vars(HostDriver) if name.startswith("cu")]
    assert len(functions) > 30
    for name in functions:
        own = inspect.signature(getattr(HostDriver, name)).parameters
        if name == "cuLaunchKernel":  # (function, *rest) here
            assert getattr(real, name).__doc__.splitlines()[0].count(",") == 10
            continue
        (theirs,) = re.findall(r"\((.*)\)", getattr(real, name).__doc__.splitlines()[0])
        assert len(own) - 1 == len([part for part in theirs.split(",") if part.strip()]), name
    for status in Status:
        assert int(getattr(real.CUresult, status.name)) == status
    attributes = vars(HostDriver.CUdevice_attribute)
    assert {name: int(getattr(real.CUdevice_attribute, name)) for name in attributes} == attributes
    assert set(vars(HostDriver().CUDA_MEMCPY2D())) <= set(dir(real.CUDA_MEMCPY2D))


@pytest.fixture
def driverless() -> Any:
    """The real bindings, on a machine where none of their functions does anything."""
    real = pytest.importorskip("cuda.bindings.driver")
    try:
        real.cuInit(0)
    except RuntimeError:
        return real
    pytest.skip("there is a driver")


def test_the_bindings_without_a_driver(driverless: Any) -> None:
    with pytest.raises(BackendError, match=r"cuInit is not there.*580 or newer.*--gpus all"):
        Cuda()


def test_the_bindings_take_the_arguments_that_are_passed(driverless: Any) -> None:
    """They convert arguments before they look for the driver, so each call gets as far as that."""

    class Both(HostDriver):
        CUDA_MEMCPY2D = staticmethod(driverless.CUDA_MEMCPY2D)
        CUmemorytype = driverless.CUmemorytype
        CUstreamCaptureMode = driverless.CUstreamCaptureMode
        CUdevice_attribute = driverless.CUdevice_attribute

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            if not name.startswith("cu"):
                return found

            def called(*arguments: Any) -> Any:
                with pytest.raises(RuntimeError, match="cuda"):
                    getattr(driverless, name)(*arguments)
                return found(*arguments)

            return called

    driver = Both()
    use_everything(Cuda("cuda", driver, lambda _: b"code"))
    assert set(driver.calls) == {name for name in vars(HostDriver) if name.startswith("cu")}


def use_everything(gpu: Cuda) -> None:
    array, other = gpu.zeros((4, 2), np.float32), gpu.empty((4, 3), np.float32)
    gpu.upload(np.ones((4, 2), np.float32), array)
    with gpu.capture() as graph:
        gpu.copy(array, other)
        gpu.copy_columns(array, other, 1)
        gpu.launch("normal", (1, 1), 32, normal_arguments(array))
    graph.launch()
    gpu.download(other)
    gpu.milliseconds(gpu.mark(), gpu.mark())
    gpu.memory()
    graph.close()
    gpu.free(array)
    gpu.close()


# ---- Beginning and end


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
        Cuda()


@pytest.mark.parametrize("function", ["cuStreamCreate", "cuModuleLoadData", "cuModuleGetFunction"])
def test_a_beginning_that_fails_leaves_nothing_behind(function: str) -> None:
    driver = HostDriver()
    driver.failing[function] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(BackendError, match=f"{function} says CUDA_ERROR_INVALID_IMAGE"):
        Cuda("cuda", driver, lambda _: b"")
    assert not any(driver.alive.values())


def test_kernels_that_are_too_new_for_the_driver() -> None:
    driver = HostDriver(version=12040)
    driver.failing["cuModuleLoadData"] = Status.CUDA_ERROR_INVALID_IMAGE
    with pytest.raises(BackendError, match=r"CUDA 12\.4\) does not take the kernels.*nvidia-cuda-nvrtc-cu12"):
        Cuda("cuda", driver, lambda _: b"")


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
def test_a_closed_device_is_refused(use: Callable[[Cuda], Any]) -> None:
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


# ---- Memory


def test_memory_is_counted(gpu: HostGpu) -> None:
    free, total = gpu.memory()
    arrays = [gpu.empty((3, 5), np.float16), gpu.zeros((7,), np.uint8), gpu.empty((0, 4), np.float32)]
    assert [array.bytes for array in arrays] == [30, 7, 0]
    assert (gpu.download(arrays[1]) == 0).all()
    assert gpu.memory() == (free - 38, total)
    for array in arrays:
        gpu.free(array)
    assert gpu.memory() == (free, total)
    with pytest.raises(BackendError, match="not held"):
        gpu.free(arrays[0])


def test_too_little_memory() -> None:
    with host_gpu(memory=3 * 2**20) as gpu:
        held = gpu.empty((2**20,), np.uint8)
        with pytest.raises(DeviceMemoryError, match=r"4\.0 MiB .* 2\.0 MiB of 3\.0 MiB are free"):
            gpu.empty((2**20,), np.float32)
        gpu.free(held)


@given(rows=st.integers(1, 5), width=st.integers(1, 4), wider=st.integers(1, 9), column=st.integers(0, 9))
@settings(deadline=None, max_examples=30)
def test_columns_are_copied_or_refused(rows: int, width: int, wider: int, column: int) -> None:
    part = np.arange(rows * width, dtype=np.int16).reshape(rows, width)
    with host_gpu() as gpu:
        source, target = gpu.empty((rows, width), np.int16), gpu.zeros((rows, wider), np.int16)
        gpu.upload(part, source)
        if column + width <= wider:
            gpu.copy_columns(source, target, column)
            expected = np.zeros((rows, wider), np.int16)
            expected[:, column : column + width] = part
            np.testing.assert_array_equal(gpu.download(target), expected)
        else:
            with pytest.raises(BackendError, match="at column"):
                gpu.copy_columns(source, target, column)
        gpu.free(source)
        gpu.free(target)


def test_copies(gpu: HostGpu) -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    source, target = gpu.zeros((6, 4), np.float32), gpu.zeros((2, 6, 4), np.float32)
    gpu.upload(array.T, source)  # not dense
    array[:] = 0
    gpu.copy(source, target.part(1))
    np.testing.assert_array_equal(gpu.download(target)[1], np.arange(24).reshape(4, 6).T)
    assert (gpu.download(target)[0] == 0).all()
    gpu.fill_zero(target.part(1))
    assert (gpu.download(target) == 0).all()
    with pytest.raises(BackendError, match="to be copied"):
        gpu.copy(target, source)
    for wrong in (np.zeros((6, 4)), np.zeros((6, 5), np.float32)):
        with pytest.raises(BackendError, match="to be copied"):
            gpu.upload(wrong, source)
    gpu.free(source)
    gpu.free(target)


@pytest.mark.parametrize("host_pages", [False, True])
def test_devices_that_read_the_hosts_pages_are_waited_for(host_pages: bool) -> None:
    with host_gpu(host_pages=host_pages) as gpu:
        array = gpu.empty((2,), np.float32)
        gpu.host.calls.clear()
        gpu.upload(np.ones(2, np.float32), array)
        assert ("cuStreamSynchronize" in gpu.host.calls) is host_pages
        gpu.free(array)


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
def test_every_error_is_told(gpu: HostGpu, function: str, use: Callable[[Cuda, Any], Any]) -> None:
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


# ---- Graphs


def normal_arguments(array: Any, seed: int = 1) -> tuple[Any, ...]:
    """Of the kernel that fills an array with noise."""
    counts = ctypes.c_int(array.bytes // 4), ctypes.c_uint(256), ctypes.c_ulonglong(seed), ctypes.c_ulonglong(0)
    return ctypes.c_void_p(array.pointer), *counts


def test_captured_work_runs_at_each_launch_and_not_before(gpu: HostGpu) -> None:
    source, target = gpu.zeros((4,), np.float32), gpu.zeros((4,), np.float32)
    heard = []
    with gpu.capture() as graph:
        gpu.copy(source, target)
        gpu.call(lambda: heard.append(view(target)[0]))
        gpu.fill_zero(source)
    assert (gpu.download(target) == 0).all()
    for value in (3, 4):
        fill(source, value)
        graph.launch()
        assert (gpu.download(target) == value).all()
        assert (gpu.download(source) == 0).all()
    assert heard == [3, 4]
    graph.close()
    graph.close()
    with pytest.raises(BackendError, match="the graph is not there"):
        graph.launch()
    gpu.free(source)
    gpu.free(target)


def test_arguments_are_those_of_the_capture(gpu: HostGpu) -> None:
    array, expected = gpu.zeros((4,), np.float32), gpu.zeros((4,), np.float32)
    arguments = normal_arguments(array, seed=7)
    with gpu.capture() as graph:
        gpu.launch("normal", (1, 1), 32, arguments)
    arguments[3].value = 8
    graph.launch()
    gpu.launch("normal", (1, 1), 32, normal_arguments(expected, seed=7))
    np.testing.assert_array_equal(gpu.download(array), gpu.download(expected))
    assert (gpu.download(array) != 0).all()
    graph.close()
    gpu.free(array)
    gpu.free(expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda gpu, array: gpu.empty((1,), np.float32),
        lambda gpu, array: gpu.zeros((1,), np.float32),
        lambda gpu, array: gpu.free(array),
        lambda gpu, array: gpu.upload(np.zeros(4, np.float32), array),
        lambda gpu, array: gpu.download(array),
        lambda gpu, array: gpu.wait(),
        lambda gpu, array: gpu.mark(),
        lambda gpu, array: gpu.capture().__enter__(),
    ],
)
def test_what_cannot_be_captured_is_refused_and_ends_the_capture(gpu: HostGpu, use: Callable[[Cuda, Any], Any]) -> None:
    array = gpu.zeros((4,), np.float32)
    with pytest.raises(BackendError, match="within a capture"), gpu.capture() as graph:
        use(gpu, array)
    with pytest.raises(BackendError, match="the graph is not there"):
        graph.launch()
    assert gpu.host.alive["graph"] == 0
    gpu.free(array)  # usable again


def give_up_and_fail(gpu: HostGpu) -> None:
    gpu.host.cuMemAlloc(4)
    raise ZeroDivisionError


def test_an_error_within_a_capture_is_the_one_that_is_seen(gpu: HostGpu) -> None:
    """Also where the driver has given the capture up by then."""
    with pytest.raises(ZeroDivisionError), gpu.capture():
        give_up_and_fail(gpu)
    gpu.wait()


def test_a_capture_that_the_driver_gives_up(gpu: HostGpu) -> None:
    words = r"cuStreamEndCapture says CUDA_.*_INVALIDATED; a network's library took memory.*capture=False"
    with pytest.raises(BackendError, match=words), gpu.capture():
        gpu.host.cuMemAlloc(4)
    gpu.wait()


def test_a_capture_that_finds_no_memory(gpu: HostGpu) -> None:
    gpu.host.failing["cuStreamEndCapture"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceMemoryError), gpu.capture():
        pass
    del gpu.host.failing["cuStreamEndCapture"]
    gpu.host.cuGraphDestroy(gpu.host.cuStreamEndCapture(gpu.stream)[1])


def test_a_graph_that_cannot_be_made(gpu: HostGpu) -> None:
    gpu.host.failing["cuGraphInstantiate"] = Status.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(DeviceMemoryError), gpu.capture():
        pass
    assert gpu.host.alive["graph"] == 0


def test_a_graph_may_outlive_its_device() -> None:
    gpu, driver = cuda()
    with gpu.capture() as graph:
        pass
    gpu.close()
    with pytest.raises(BackendError, match="the GPU was closed"):
        graph.launch()
    graph.close()
    assert driver.alive["context"] == 0


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
