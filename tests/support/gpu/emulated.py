"""`benchmarks.gpu.hardware` without a GPU: an emulated device, ONNX Runtime on the CPU, a fake TensorRT, torch's CPU.

So the whole benchmark and the tests of tests/gpu run without a GPU. None of these figures means anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrt.runtime.base import Backend
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.tensorrt.backend import TensorRtBackend
from tests.support.gpu.fakes.fake_plans import put_plans
from tests.support.gpu.fakes.fake_tensorrt import FakeTensorRt
from tests.support.gpu.host_gpu import HostGpu

DEVICE = "cpu"
HALF = "float32"
PRODUCT = (64, 2)


class ClockedGpu(HostGpu):
    """An emulated GPU whose marks are points in real time."""

    def mark(self) -> Any:
        mark = super().mark()
        mark.seconds = time.perf_counter()
        return mark

    def milliseconds(self, start: Any, end: Any) -> float:
        return 1000 * float(end.seconds - start.seconds)


def open_backend(
    name: str,
    precision: str = "fp16",
    *,
    graph: str = "",
    options: Mapping[str, str] | None = None,
    plans: Path | None = None,
) -> Backend:
    """Return a backend on an emulated GPU of its own; graphs for CUDA and its options are left to real ones."""
    gpu = ClockedGpu()
    if name == "onnxruntime":
        return OrtBackend(threads=1, precision=precision, gpu=gpu)
    fake = FakeTensorRt(name, submit=gpu.call)
    return TensorRtBackend(gpu, fake.library, precision=precision, plans=plans)


def build_plans(
    bundle: Path,
    networks: Sequence[str],
    library: str,
    lanes: int,
    size: tuple[int, int],
    limit: float,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Write fake plans for a number of lanes and a size in pixels."""
    gpu = HostGpu()
    fake = FakeTensorRt(library, submit=gpu.call)
    shapes = {"lanes": str(lanes), "size": "{}x{}".format(*size)}
    records = put_plans(bundle, fake, gpu, shapes, networks=networks, options=options)
    gpu.close()
    return [{"network": record.key.network, "seconds": 1.0, "bytes": record.bytes} for record in records]


def compile_options(mode: str) -> dict[str, Any]:
    return {"backend": "eager"}


def regional_options() -> dict[str, Any]:
    return {"backend": "eager"}


def kernel_times(work: Callable[[], None]) -> dict[str, tuple[int, float]]:
    """Run it, and return made-up times."""
    work()
    return {"sm90_xmma_fprop_implicit_gemm": (6, 12.0), "nvjet_hsh_gemm": (9, 6.0), "a_light | kernel": (30, 2.0)}


def free_memory() -> Callable[[], int]:
    """Return a function that reports 1 GiB."""
    return lambda: 2**30


def describe() -> dict[str, Any]:
    """Describe the emulated device."""
    return {
        "name": "an emulated GPU",
        "compute_capability": "9.0",
        "multiprocessors": 2,
        "memory_gib": 1.0,
        "cuda": "13",
    }
