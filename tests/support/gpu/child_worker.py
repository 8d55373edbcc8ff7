"""The worker of a benchmark's child process in tests/benchmarks/test_benchmarks_gpu.py; it imports next to nothing."""

from __future__ import annotations

import os
import time


class Worker:
    def __init__(self, number: int) -> None:
        self.number = number

    def add(self, other: int) -> int:
        return self.number + other

    def die(self) -> None:
        os.write(2, b"CUDA error: an illegal memory access\n")
        os._exit(3)

    def sleep(self) -> None:
        time.sleep(3600)

    def close(self) -> None:
        pass
