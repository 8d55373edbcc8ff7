"""Arrays in a device's memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np


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
