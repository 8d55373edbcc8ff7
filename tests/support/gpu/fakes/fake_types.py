"""The enumerations and plain types of the fake TensorRT; test_fakes.py compares them with tensorrt_rtx."""

from __future__ import annotations

import enum
from typing import Any

from numpy.typing import NDArray


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class DataType(enum.IntEnum):
    FLOAT, HALF, INT8, INT32, BOOL, UINT8, FP8, BF16, INT64 = range(9)


class TensorIOMode(enum.IntEnum):
    NONE, INPUT, OUTPUT = range(3)


class TensorLocation(enum.IntEnum):
    DEVICE, HOST = range(2)


class ExecutionContextAllocationStrategy(enum.IntEnum):
    STATIC, ON_PROFILE_CHANGE, USER_MANAGED = range(3)


class DynamicShapesKernelSpecializationStrategy(enum.IntEnum):
    LAZY, EAGER, NONE = range(3)


TYPES = {
    "float32": DataType.FLOAT,
    "float16": DataType.HALF,
    "int8": DataType.INT8,
    "int32": DataType.INT32,
    "int64": DataType.INT64,
    "bool": DataType.BOOL,
    "uint8": DataType.UINT8,
}


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, msg: str) -> None:
        raise NotImplementedError


class Weights:
    """An array, not copied."""

    def __init__(self, a: NDArray[Any]) -> None:
        self.a = a
        self.dtype, self.size = TYPES[a.dtype.name], a.size
