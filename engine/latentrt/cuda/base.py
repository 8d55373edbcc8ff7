"""A GPU as the engine sees it: memory, one stream, kernels, and work that is captured once and launched as a whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class DeviceArray:
    """An array in a device's memory, dense, in C order; its maker frees it."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def bytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def part(self, index: int, count: int = 1) -> DeviceArray:
        """Return `count` items of the first axis from `index` on, in the same memory."""
        shape = (count, *self.shape[1:])
        step = math.prod(self.shape[1:]) * self.dtype.itemsize
        return DeviceArray(self.pointer + index * step, shape, self.dtype)

    def reshape(self, *shape: int) -> DeviceArray:
        """Return the same memory with another shape of as many items."""
        return DeviceArray(self.pointer, shape, self.dtype)


class Graph(Protocol):
    """Work that was captured once and is launched as a whole, again and again, on the memory it was captured with."""

    def launch(self) -> None:
        """Queue all of it."""

    def close(self) -> None:
        """Release the graph."""


class Gpu(Protocol):
    """One device with one stream: everything queued on it runs in that order, and only `download` and `wait` wait.

    Kernels are those of `advance.cu`. Calls inside `with gpu.capture() as graph` are recorded,
    not run; memory can be neither taken nor downloaded there.
    """

    name: str
    ordinal: int
    compute_capability: tuple[int, int]
    driver: str
    stream: int

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Return new memory, its contents undefined. Raise DeviceMemoryError where there is not enough."""

    def zeros(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Return new memory of zeros."""

    def free(self, array: DeviceArray) -> None:
        """Free memory that `empty` or `zeros` returned."""

    def upload(self, array: NDArray[Any], target: DeviceArray) -> None:
        """Queue a copy from the host; the array may be changed as soon as this returns."""

    def download(self, source: DeviceArray) -> NDArray[Any]:
        """Wait for all queued work, and return a copy on the host."""

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queue a copy within the device, of the source's bytes."""

    def copy_columns(self, source: DeviceArray, target: DeviceArray, column: int) -> None:
        """Queue a copy of a (rows, width) array into the columns from `column` on of a (rows, wider) one."""

    def fill_zero(self, target: DeviceArray) -> None:
        """Queue zeros."""

    def call(self, enqueue: Callable[[], None]) -> None:
        """Call a library's function that queues work on `stream`."""

    def launch(self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """Queue a kernel of `advance.cu` over (x, y) blocks of `threads` threads each."""

    def capture(self) -> AbstractContextManager[Graph]:
        """Record instead of running; the graph may be launched once the block has ended."""

    def mark(self) -> Any:
        """Return a mark in the queue: after everything that was queued so far."""

    def wait_for(self, mark: Any) -> None:
        """Wait until the device has reached a mark."""

    def wait(self) -> None:
        """Wait for everything that was queued."""

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the device that are free, and the bytes in all."""

    def close(self) -> None:
        """Release the device's context."""
