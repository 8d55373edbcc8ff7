"""TensorRT without a GPU: its run-time interface over ONNX Runtime and host memory.

A "plan" is JSON that names an ONNX graph and its signature; a context runs that graph at the addresses that it was
given, so on a `HostGpu` the whole TensorRT path computes. Names, parameters and enumerations are the real ones
(test_fakes.py compares them with tensorrt_rtx), and so are the results of misuse: None or False, and a logged error.
"""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from typing import Any

import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import numpy_helper

from latentrt.runtime.tensorrt.library import Library
from tests.support.gpu.fakes.fake_contexts import IExecutionContext
from tests.support.gpu.fakes.fake_types import (
    TYPES,
    DataType,
    DynamicShapesKernelSpecializationStrategy,
    ExecutionContextAllocationStrategy,
    ILogger,
    Severity,
    TensorIOMode,
    TensorLocation,
    Weights,
)

MAGIC = "a plan of fake_tensorrt"
VERSIONS = {"tensorrt": "11.4.0.106", "tensorrt-rtx": "1.7.1.116", "tensorrt-lean": "11.4.0.106"}


class Runtime:
    def __init__(self, logger: ILogger) -> None:
        assert isinstance(logger, ILogger)
        self.logger = logger
        self.engine_host_code_allowed = True  # not the real default: so a caller that needs it off must turn it off
        self.tempfile_control_flags = 3
        self._fake: FakeTensorRt  # set by FakeTensorRt.Runtime

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> ICudaEngine | None:
        fake = self._fake
        fake.deserialized += 1
        assert not self.engine_host_code_allowed
        assert not self.tempfile_control_flags
        try:
            plan = json.loads(serialized_engine)
            assert plan["magic"] == MAGIC
        except (ValueError, AssertionError):
            return self._refuse("Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match")
        if plan["version"] != fake.__version__:
            return self._refuse(
                f"Version tag does not match. Note: Current Version: {fake.__version__}, Serialized Engine Version: "
                f"{plan['version']}"
            )
        if fake.out_of_memory:
            return self._refuse("[defaultAllocator.cpp::allocate::31] Error Code 1: Gpu Runtime (out of memory)")
        return ICudaEngine(fake, self.logger, plan)

    def _refuse(self, words: str) -> None:
        self.logger.log(Severity.ERROR, f"IRuntime::deserializeCudaEngine: Error Code 1: {words}")


class ICudaEngine:
    def __init__(self, fake: FakeTensorRt, logger: ILogger, plan: dict[str, Any]) -> None:
        self._fake, self._logger, self._plan = fake, logger, plan
        self._tensors = {t["name"]: t for t in (*plan["inputs"], *plan["outputs"])}
        self._model = onnx.load(plan["onnx"])
        self._initializers = {i.name: i for i in self._model.graph.initializer if i.data_type in (1, 10, 16)}
        self._lacking = set(self._initializers) if plan["stripped"] else set()
        self._session: Any = None

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._plan["profiles"])

    @property
    def refittable(self) -> bool:
        return bool(self._plan["refittable"])

    @property
    def device_memory_size_v2(self) -> int:
        return self._plan["memory"]

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        inputs = {t["name"] for t in self._plan["inputs"]}
        return TensorIOMode.INPUT if name in inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return TYPES[self._tensors[name]["dtype"]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(-1 if isinstance(side, str) else side for side in self._tensors[name]["shape"])

    def create_runtime_config(self) -> RuntimeConfig:
        return RuntimeConfig()

    def create_execution_context(self, strategy: Any = ExecutionContextAllocationStrategy.STATIC) -> Any:
        if isinstance(strategy, RuntimeConfig):
            assert strategy.dynamic_shapes_kernel_specialization_strategy is (
                DynamicShapesKernelSpecializationStrategy.EAGER
            )
            strategy = strategy.strategy
        assert strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        return IExecutionContext(self)

    def _run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        assert not self._lacking, f"weights were never set: {sorted(self._lacking)}"
        if self._session is None:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            self._session = onnxruntime.InferenceSession(
                self._model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        names = [t["name"] for t in self._plan["outputs"]]
        return dict(zip(names, self._session.run(names, feeds), strict=True))


class RuntimeConfig:
    """IRuntimeConfig of tensorrt_rtx."""

    def __init__(self) -> None:
        self.dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY
        self.strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(self, strategy: ExecutionContextAllocationStrategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> object:
        return object()

    def set_runtime_cache(self, cache: object) -> bool:
        return True


class Refitter:
    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        assert engine.refittable  # the real one would be a null pointer
        self._engine, self._logger = engine, logger
        self._set: dict[str, weakref.ref[NDArray[Any]]] = {}  # a pointer: the caller has to keep the weights

    def get_all_weights(self) -> list[str]:
        return list(self._engine._initializers)

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        initializer = self._engine._initializers.get(name)
        if initializer is None:
            return self._refuse(f"{name} is not refittable")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type).name
        if weights.size != math.prod(initializer.dims) or weights.dtype is not TYPES[dtype]:
            return self._refuse(f"{name} has {weights.size} values of {weights.dtype.name}")
        self._set[name] = weakref.ref(weights.a)
        return True

    def get_missing_weights(self) -> list[str]:
        """Return those that were never there, and those that TensorRT merged with one that was set."""
        merged = {name for group in self._engine._plan["merged"] if set(group) & set(self._set) for name in group}
        return sorted((self._engine._lacking | merged) - set(self._set))

    def refit_cuda_engine(self) -> bool:
        if missing := self.get_missing_weights():
            return self._refuse(f"missing {missing}")
        for name, weights in self._set.items():
            initializer = self._engine._initializers[name]
            values = weights()
            if values is None:
                return self._refuse(f"the memory of {name} is gone")
            initializer.CopyFrom(numpy_helper.from_array(values.reshape(tuple(initializer.dims)), name))
        self._engine._lacking -= set(self._set)
        self._engine._session = None
        self._engine._fake.refits += 1
        self._engine._fake.sent = set(self._set)
        return True

    def _refuse(self, words: str) -> bool:
        self._logger.log(Severity.ERROR, f"IRefitter: Error Code 3: API Usage Error ({words})")
        return False


class FakeTensorRt:
    """The module.

    Attributes:
        deserialized, refits: how many times plans were deserialized and refitted.
        sent: the names of the weights of the last refit.
        contexts: those that were made.
        out_of_memory, enqueue_fails: faults on request.

    Args:
        name: the flavour.
        version: its version.
        submit: queues a function on the emulated device's stream; the default calls it at once.
    """

    ILogger = ILogger
    DataType, TensorIOMode, TensorLocation = DataType, TensorIOMode, TensorLocation
    Weights, Refitter = Weights, Refitter

    def __init__(
        self,
        name: str = "tensorrt",
        version: str | None = None,
        submit: Callable[[Callable[[], None]], None] = lambda run: run(),
    ) -> None:
        self.name, self.__version__ = name, version or VERSIONS[name]
        self.submit = submit
        self.deserialized = self.refits = 0
        self.sent: set[str] = set()
        self.contexts: list[Any] = []
        self.out_of_memory = self.enqueue_fails = False
        self.ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy
        if name == "tensorrt-rtx":
            self.DynamicShapesKernelSpecializationStrategy = DynamicShapesKernelSpecializationStrategy

    def Runtime(self, logger: ILogger) -> Runtime:  # noqa: N802 (TensorRT's name)
        runtime = Runtime(logger)
        runtime._fake = self
        return runtime

    @property
    def library(self) -> Library:
        version = self.__version__
        return Library(self.name, self, version, tuple(map(int, version.split("."))))
