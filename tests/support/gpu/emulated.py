"""`benchmarks.gpu.hardware` without a GPU: an emulated device, ONNX Runtime on the CPU, a fake TensorRT, torch's CPU.

So the whole benchmark and the tests of tests/gpu run without a GPU. None of these figures means anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import CONDITIONER, DENOISER, TEXT_ENCODER
from latentrt.runtime.base import Backend
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.tensorrt.backend import TensorRtBackend
from latentrt_export.plans.plan_graph import weights_of
from tests.support.gpu.fake_plans import put_plan
from tests.support.gpu.fake_tensorrt import FakeTensorRt
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
    name: str, precision: str = "fp16", *, graph: str = "", options: Mapping[str, str] | None = None
) -> Backend:
    """Return a backend on an emulated GPU of its own; graphs for CUDA and its options are left to real ones."""
    gpu = ClockedGpu()
    if name == "onnxruntime":
        return OrtBackend(threads=1, precision=precision, gpu=gpu)
    fake = FakeTensorRt(name, submit=gpu.call)
    return TensorRtBackend(gpu, fake.library, precision=precision)


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
    opened, gpu = Bundle.open(bundle, check_hashes=False), HostGpu()
    fake, factor = FakeTensorRt(library, submit=gpu.call), opened.spec.latents.factor
    built = []
    for network in networks:
        graph, divisor = opened.spec.graphs("fp16")[network], 1 if network == "vae_encoder" else factor
        role = opened.spec.networks[network].role
        batch = (1, 1, lanes) if role in (TEXT_ENCODER, CONDITIONER) else (lanes if role == DENOISER else 1,) * 3
        ranges = {
            "tokens": (77,) * 3,
            "batch": batch,
            "height": (size[1] // divisor,) * 3,
            "width": (size[0] // divisor,) * 3,
        }
        names = {side for tensor in graph.inputs for side in tensor.shape if isinstance(side, str)}
        settable = {"stripped", "refittable"} & set(options)
        refit = weights_of(ir.load(opened.path(graph.path)), graph) if settable else {}
        record = put_plan(
            *(opened, network, fake, gpu, {name: ranges[name] for name in ranges if name in names}),
            precision="fp16",
            options=[option.replace("=", "-") for option in options],
            refit=refit,
        )
        built.append({"network": network, "seconds": 1.0, "bytes": record.bytes})
    gpu.close()
    return built


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
