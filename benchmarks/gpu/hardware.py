"""Everything that is opened on a GPU. The tests have a module of the same functions for machines without one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentrt.cuda.driver import Driver
from latentrt.cuda.gpu import Gpu
from latentrt.runtime import open_backend as _open_backend
from latentrt.runtime.base import Backend
from latentrt.runtime.onnxruntime import OrtBackend, check_device

DEVICE = "cuda"  # torch's name
HALF = "float16"  # the dtype of diffusers' sides
PRODUCT = (8192, 20)  # side of the matrices whose product shows the peak, and calls
ROOT = Path(__file__).parents[2]


def open_backend(
    name: str, precision: str = "fp16", *, graph: str = "", options: Mapping[str, str] | None = None
) -> Backend:
    """Return a backend with its GPU.

    Args:
        name: of the backend.
        precision: "fp16" or "fp32".
        graph: ONNX Runtime runs this variant of the bundle's graphs; empty is its own.
        options: for ONNX Runtime's CUDA provider.

    Raises:
        BackendError, MissingDependencyError: it cannot be used here.
    """
    if not graph and not options:
        return _open_backend(name, DEVICE, precision=precision)
    check_device(DEVICE)
    gpu = Gpu(DEVICE)
    try:
        backend = OrtBackend(DEVICE, precision=precision, gpu=gpu, provider_options=options or {})
    except BaseException:
        gpu.close()
        raise
    if graph:
        backend.variants = (graph,)
    return backend


def build_plans(
    bundle: Path,
    networks: Sequence[str],
    library: str,
    lanes: int,
    size: tuple[int, int],
    limit: float,
    options: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Build missing plans, as a user does; return the seconds that each took when it was built, and its bytes.

    `size` is width and height in pixels; `options` are flags of `latentrt build` ("refittable", ...).

    Raises:
        RuntimeError: they cannot be built in `limit` seconds; the message is the command's.
    """
    named = [word for network in networks for word in ("--network", network)]
    named += [f"--{option}" for option in options]
    shapes = ["--lanes", str(lanes), "--size", "{}x{}".format(*size)]
    out = latentrt("build", str(bundle), *named, *shapes, "--library", library, "--json", limit=limit)
    plans = json.loads(out)["plans"]
    return [
        {"network": plan["key"]["network"], "seconds": plan["made"].get("seconds"), "bytes": plan["bytes"]}
        for plan in plans
    ]


def latentrt(*words: str, limit: float) -> str:
    """Run the command in a process of its own; return what it printed.

    Raises:
        RuntimeError: it failed, with its message, or takes longer than `limit` seconds.
    """
    command = [sys.executable, "-m", "latentrt", *words]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"latentrt {words[0]} took longer than {limit:.0f} s") from error
    if done.returncode:
        raise RuntimeError(_said(done.stderr + done.stdout) or f"latentrt {words[0]} exited with {done.returncode}")
    return done.stdout


def _said(text: str) -> str:
    """Return the error that the command printed, as JSON or as text, in one line."""
    try:
        error = json.loads(text)["error"]
        return f"{error['found']}. Needed: {error['needed']}. To fix it: {error['fix']}"
    except (ValueError, KeyError, TypeError):
        return " ".join(text.split())[-600:]


def regional_options() -> dict[str, Any]:
    """Return the arguments of torch.compile where only repeated blocks are compiled."""
    return {"fullgraph": True}


def compile_options(mode: str) -> dict[str, Any]:
    """Return the arguments of torch.compile."""
    return {"mode": mode, "fullgraph": True}


def kernel_times(work: Callable[[], None]) -> dict[str, tuple[int, float]]:
    """Return calls and milliseconds of every kernel that ran during `work`, whichever library launched it.

    Raises:
        RuntimeError: torch, whose profiler it is, has no CUDA device.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    if not torch.cuda.is_available():
        raise RuntimeError(f"this torch ({torch.__version__}) has no CUDA device")
    torch.cuda.init()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        work()
        torch.cuda.synchronize()
    calls, times = Counter[str](), dict[str, float]()
    for event in found.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            calls[event.name] += 1
            times[event.name] = times.get(event.name, 0.0) + event.time_range.elapsed_us() / 1000
    return {name: (calls[name], milliseconds) for name, milliseconds in times.items()}


def free_memory() -> Callable[[], int]:
    """Return a function that returns how many bytes of the GPU are free.

    Raises:
        BackendError, MissingDependencyError: there is no driver, or no bindings.
    """
    drive = _first_device()
    return lambda: int(drive("cuMemGetInfo")[0])


def describe() -> dict[str, Any]:
    """Return the GPU that the figures are for."""
    drive = _first_device()
    device = drive("cuDeviceGet", 0)
    names = ("COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR", "MULTIPROCESSOR_COUNT")
    major, minor, multiprocessors = (
        drive("cuDeviceGetAttribute", getattr(drive.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), device)
        for name in names
    )
    return {
        "name": drive("cuDeviceGetName", 256, device).split(b"\0")[0].decode(),
        "compute_capability": f"{major}.{minor}",
        "multiprocessors": multiprocessors,
        "memory_gib": round(drive("cuMemGetInfo")[1] / 2**30, 1),
        "cuda": drive.version,
    }


def _first_device() -> Driver:
    drive = Driver()
    drive.context = drive("cuDevicePrimaryCtxRetain", drive("cuDeviceGet", 0))
    return drive
