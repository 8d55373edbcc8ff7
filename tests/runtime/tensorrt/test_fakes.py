"""The fake TensorRT of other tests is like the real one: names, parameters, enumerations."""

from __future__ import annotations

import enum
import inspect
import re

import numpy as np
import pytest

from latentrt.runtime.tensorrt.library import Library, open_library
from tests.support.gpu.fakes import fake_tensorrt, fake_types
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt


@pytest.fixture(scope="module")
def rtx() -> Library:
    pytest.importorskip("tensorrt_rtx")
    return open_library("tensorrt-rtx")


ENUMERATIONS = [
    name for name, value in vars(fake_types).items() if inspect.isclass(value) and issubclass(value, enum.IntEnum)
]
CLASSES = {
    "Runtime": ("Runtime",),
    "ICudaEngine": ("ICudaEngine",),
    "IExecutionContext": ("IExecutionContext",),
    "Refitter": ("Refitter",),
    "RuntimeConfig": ("IRuntimeConfig",),
    "ILogger": ("ILogger",),
}


@pytest.mark.parametrize("name", sorted(set(ENUMERATIONS) - {"IntEnum"}))
def test_the_fakes_enumerations_are_real(rtx: Library, name: str) -> None:
    fake = getattr(fake_types, name)
    real = rtx.module.ILogger.Severity if name == "Severity" else getattr(rtx.module, name)
    assert {member.name: int(member) for member in fake}.items() <= {
        member: int(value) for member, value in real.__members__.items()
    }.items()


def test_enough_is_compared() -> None:
    assert {"DataType", "TensorIOMode", "TensorLocation", "Severity"} <= set(ENUMERATIONS)


@pytest.mark.parametrize("name", CLASSES)
def test_the_fakes_classes_have_nothing_that_the_real_ones_lack(rtx: Library, name: str) -> None:
    fake = getattr(fake_tensorrt, name)
    real = getattr(rtx.module, CLASSES[name][0])
    public = [attribute for attribute in dir(fake) if not attribute.startswith("_")]
    assert public
    for attribute in public:
        assert hasattr(real, attribute), attribute
        member = inspect.getattr_static(fake, attribute)
        if inspect.isfunction(member):
            parameters = [p for p in inspect.signature(member).parameters if p != "self"]
            assert takes(getattr(real, attribute).__doc__, parameters), (attribute, parameters)


def takes(documentation: str, parameters: list[str]) -> bool:
    """Return whether one of a pybind11 function's overloads begins with these parameters."""
    overloads = re.findall(r"\(self: [\w.]+(.*)\) -> ", documentation)
    return any(re.findall(r"(?:, )(\w+): ", overload)[: len(parameters)] == parameters for overload in overloads)


def test_the_fakes_attributes_are_real(rtx: Library) -> None:
    """Those that the runtime sets, and those of a module that the backend reads."""
    for attribute in ("engine_host_code_allowed", "tempfile_control_flags"):
        assert isinstance(getattr(rtx.module.Runtime, attribute), property)
    for attribute in ("ILogger", "DataType", "TensorIOMode", "TensorLocation", "Weights", "Refitter", "Runtime"):
        assert hasattr(rtx.module, attribute)
        assert hasattr(FakeTensorRt(), attribute)
    config = rtx.module.IRuntimeConfig
    assert isinstance(config.dynamic_shapes_kernel_specialization_strategy, property)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int32", "int64", "bool"])
def test_the_fakes_weights_are_like_the_real_ones(rtx: Library, dtype: str) -> None:
    array = np.zeros(5, dtype)
    real, fake = rtx.module.Weights(array), fake_tensorrt.Weights(array)
    assert (real.dtype.name, real.size) == (fake.dtype.name, fake.size)
    assert real.numpy().ctypes.data == array.ctypes.data == fake.a.ctypes.data
