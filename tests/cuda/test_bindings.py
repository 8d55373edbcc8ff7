"""The driver of the tests has the functions of cuda-bindings, and `Gpu` passes arguments that these take."""

from __future__ import annotations

import inspect
import re
from typing import Any

import numpy as np
import pytest

from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError
from tests.support.gpu.host_gpu import HostDriver, Status, normal_arguments


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
    """Return the real bindings, on a machine where none of their functions does anything."""
    real = pytest.importorskip("cuda.bindings.driver")
    try:
        real.cuInit(0)
    except RuntimeError:
        return real
    pytest.skip("there is a driver")


def test_the_bindings_without_a_driver(driverless: Any) -> None:
    with pytest.raises(BackendError, match=r"cuInit is not there.*580 or newer.*--gpus all"):
        Gpu()


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
    use_everything(Gpu("cuda", driver, lambda _: b"code"))
    assert set(driver.calls) == {name for name in vars(HostDriver) if name.startswith("cu")}


def use_everything(gpu: Gpu) -> None:
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
