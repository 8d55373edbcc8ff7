"""CUDA graphs: captured work runs at each launch, and work that cannot be captured is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError, DeviceMemoryError
from tests.support.gpu.host_gpu import HostGpu, Status, normal_arguments, view


def fill(array: Any, value: float) -> None:
    view(array)[:] = value


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
    with pytest.raises(BackendError, match="the graph is not captured"):
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
def test_what_cannot_be_captured_is_refused_and_ends_the_capture(gpu: HostGpu, use: Callable[[Gpu, Any], Any]) -> None:
    array = gpu.zeros((4,), np.float32)
    with pytest.raises(BackendError, match="within a capture"), gpu.capture() as graph:
        use(gpu, array)
    with pytest.raises(BackendError, match="the graph is not captured"):
        graph.launch()
    assert gpu.host.alive["graph"] == 0
    gpu.free(array)  # usable again


def give_up_and_fail(gpu: HostGpu) -> None:
    gpu.host.cuMemAlloc(4)
    raise ZeroDivisionError


def test_an_error_within_a_capture_is_the_one_that_is_seen(gpu: HostGpu) -> None:
    """Also where the driver has ended the capture by then."""
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
    gpu = HostGpu()
    with gpu.capture() as graph:
        pass
    gpu.close()
    with pytest.raises(BackendError, match="the GPU was closed"):
        graph.launch()
    graph.close()
    assert gpu.host.alive["context"] == 0
