"""Ways to run a graph. Backends are imported at their first use, so that none is needed by the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError
from latentrt.runtime.base import Backend

BACKENDS = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "tensorrt-lean")


def open_backend(
    name: str,
    device: str | None = None,
    threads: int | None = None,
    *,
    precision: str | None = None,
    plans: str | Path | None = None,
    cache: bool = False,
    spin: bool = True,
) -> Backend:
    """Open a backend on a device.

    Args:
        name: one of BACKENDS.
        device: "cpu", "cuda" or "cuda:1"; None is "cuda" for TensorRT and the CPU for others. OpenVINO has others:
            see `OpenVinoBackend`.
        threads: of a call on the CPU.
        precision: "fp32" or "fp16", or "int8" for onnxruntime on a CPU; None is fp32 on a CPU and fp16 on a GPU.
        plans: a folder of TensorRT's plans; None is the bundle's place in the user's cache.
        cache: keep graphs that onnxruntime has optimized for this CPU in the user's cache, for quicker loading.
        spin: whether threads of a call on the CPU wait for each other by spinning: see `OrtBackend`.

    Raises:
        BackendError: unknown name, device or precision, or the device cannot be used; nothing else is tried instead.
        MissingDependencyError: the backend's library is not installed.
    """
    known = ("fp32", "fp16", *(("int8",) if name == "onnxruntime" else ()))
    if precision not in (None, *known):
        raise BackendError(f"the precision is {precision!r} for {name}", needed=f"one of {', '.join(known)}")
    if name == "onnxruntime":
        from latentrt.runtime.onnxruntime import OrtBackend, check_device

        kind = (device or "cpu").partition(":")[0]
        if kind != "cuda":
            return OrtBackend(kind, threads, precision=precision or "fp32", cache=cache, spin=spin)
        check_device(kind)  # before the driver is asked
        return _on(device, lambda gpu: OrtBackend(kind, threads, precision=precision or "fp16", gpu=gpu))
    if name == "openvino":
        from latentrt.runtime.openvino import OpenVinoBackend

        return OpenVinoBackend(device or "cpu", threads, precision=precision or "fp32")
    if name in BACKENDS:
        from latentrt.runtime.tensorrt.backend import TensorRtBackend
        from latentrt.runtime.tensorrt.library import open_library

        library, folder = open_library(name), None if plans is None else Path(plans)
        half = precision or "fp16"
        return _on(device, lambda gpu: TensorRtBackend(gpu, library, precision=half, plans=folder))
    raise BackendError(f"there is no backend {name!r}", needed=f"one of {', '.join(BACKENDS)}")


def _on(device: str | None, make: Callable[[Gpu], Backend]) -> Backend:
    """Make a backend on a GPU, which is closed where the backend cannot be made."""
    from latentrt.cuda.gpu import Gpu

    gpu = Gpu(device or "cuda")
    try:
        return make(gpu)
    except BaseException:
        gpu.close()
        raise
