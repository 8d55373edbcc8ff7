"""Execution contexts of the fake TensorRT: they run an engine's graph at the addresses that they were given."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import TensorSpec
from latentrt.runtime.signature import shape_of, sizes_of
from latentrt.runtime.tensorrt.record import Profile
from tests.support.gpu.fakes.fake_types import Severity


class IExecutionContext:
    def __init__(self, engine: Any) -> None:
        self._engine, self._fake = engine, engine._fake
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._profile = -1
        self._memory = (0, 0)
        self._fake.contexts.append(self)
        self.calls = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if not 0 <= profile_index < self._engine.num_optimization_profiles or not stream_handle:
            return self._refuse(f"profile index {profile_index}")
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        tensor = self._engine._tensors[name]
        profile = Profile(self._engine._plan["profiles"][self._profile])
        for side, size in zip(tensor["shape"], shape, strict=True):
            low, _, high = profile.side(side)
            if not low <= size <= high:
                return self._refuse(f"Set dimension {size} of {name} does not satisfy [{low}, {high}]")
        self._shapes[name] = tuple(shape)
        return True

    def infer_shapes(self) -> list[str]:
        return [t["name"] for t in self._engine._plan["inputs"] if t["name"] not in self._shapes]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        inputs = [TensorSpec(**tensor) for tensor in self._engine._plan["inputs"]]
        return shape_of(TensorSpec(**self._engine._tensors[name]), sizes_of(inputs, self._shapes))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        if name not in self._engine._tensors or memory % 256:
            return self._refuse(f"address {memory} of {name}")
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        if self._fake.enqueue_fails:
            return self._refuse("enqueue failed on request")
        lacking = [name for name in self._engine._tensors if name not in self._addresses]
        if self._profile < 0 or self.infer_shapes() or lacking or not stream_handle:
            return self._refuse(f"Address is not set for {lacking}")
        pointer, size = self._memory
        if not pointer or size < self._needed():
            return self._refuse(f"{size} bytes of device memory, {self._needed()} needed")
        self.calls += 1
        self._fake.submit(self._run)
        return True

    def _run(self) -> None:
        engine = self._engine
        ctypes.memset(self._memory[0], 0xA5, self._needed())  # the memory's old contents are lost
        inputs = [t["name"] for t in engine._plan["inputs"]]
        results = engine._run({name: self._view(name).copy() for name in inputs})
        for name, value in results.items():
            self._view(name)[...] = value

    def _view(self, name: str) -> NDArray[Any]:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self._engine._tensors[name]["dtype"])
        count = math.prod(shape)
        buffer = (ctypes.c_char * (count * dtype.itemsize)).from_address(self._addresses[name])
        return np.frombuffer(buffer, dtype, count).reshape(shape)

    def update_device_memory_size_for_shapes(self) -> int:
        assert not self.infer_shapes()
        return self._needed()

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self._memory = (memory, size)

    def _needed(self) -> int:
        """Return the bytes for these shapes: as much as the plan says for each number of the inputs."""
        return int(self._engine.device_memory_size_v2) * sum(map(math.prod, self._shapes.values()))

    def _refuse(self, words: str) -> bool:
        self._engine._logger.log(Severity.ERROR, f"IExecutionContext: Error Code 3: API Usage Error ({words})")
        return False
