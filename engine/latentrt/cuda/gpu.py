"""An NVIDIA GPU through the driver API: memory, one stream, the kernels of `advance.cu`, CUDA graphs.

The context is the device's primary one, which TensorRT, torch and onnxruntime share.
"""

from __future__ import annotations

import ctypes
import math
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.cuda.array import DeviceArray
from latentrt.cuda.driver import Driver
from latentrt.cuda.kernels import KERNELS
from latentrt.cuda.nvrtc import cubin
from latentrt.errors import BackendError, DeviceMemoryError, LatentrtError

_OWN_STREAM = 1  # CU_STREAM_NON_BLOCKING: does not wait for the legacy stream
_SLEEP = 1  # CU_EVENT_BLOCKING_SYNC: a waiting thread sleeps, and leaves the core to others


class Gpu:
    """One device with one stream: all that is queued on it runs in that order, and only `download` and `wait*` wait.

    Calls inside `with gpu.capture() as graph` are recorded, not run; memory can be neither taken nor downloaded there.

    Attributes:
        name, ordinal, compute_capability: the device's, as "NVIDIA H200", 0 and (9, 0).
        driver: the CUDA version that the driver brings, as "13.0".
        stream: the CUstream, as TensorRT takes it.

    Args:
        device: "cuda" or "cuda:<ordinal>".
        bindings: `cuda.bindings.driver`, or a stand-in for it.
        code: makes the kernels' native code for a compute capability.

    Raises:
        MissingDependencyError: no cuda-bindings, or no NVRTC.
        BackendError: no driver, no such device, or a driver that is too old.
    """

    def __init__(
        self, device: str = "cuda", bindings: Any = None, code: Callable[[tuple[int, int]], bytes] = cubin
    ) -> None:
        self._drive = Driver(bindings)
        self._stream: Any = None
        self._module: Any = None
        self._capturing = False
        self._held: set[int] = set()  # pointers that are not freed yet
        self._events: list[Any] = []
        self._spare_events: list[Any] = []
        self.driver = self._drive.version
        self.ordinal = self._find(device)
        self._device = self._drive("cuDeviceGet", self.ordinal)
        self.name = self._drive("cuDeviceGetName", 256, self._device).split(b"\0")[0].decode()
        self.compute_capability = (
            self._attribute("COMPUTE_CAPABILITY_MAJOR"),
            self._attribute("COMPUTE_CAPABILITY_MINOR"),
        )
        # Such a GPU (Grace, Jetson) copies from the host's own pages, later; others from a copy made at once.
        self._reads_host_pages = bool(self._attribute("PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES"))
        image = code(self.compute_capability)
        self._drive.context = self._drive("cuDevicePrimaryCtxRetain", self._device)
        try:
            self._load(image)
        except LatentrtError:
            self._release()
            raise

    def _find(self, device: str) -> int:
        count: int = self._drive("cuDeviceGetCount")
        match = re.fullmatch(r"cuda(?::(\d+))?", device)
        if match is None or int(match[1] or 0) >= count:
            known = ", ".join(f"cuda:{ordinal}" for ordinal in range(count)) or "no device"
            raise BackendError(f"there is no device {device!r}", needed=f"one of {known}", fix="latentrt doctor")
        return int(match[1] or 0)

    def _attribute(self, name: str) -> int:
        attribute = getattr(self._drive.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self._drive("cuDeviceGetAttribute", attribute, self._device))

    def _load(self, image: bytes) -> None:
        self._stream = self._drive("cuStreamCreate", _OWN_STREAM)
        self.stream = int(self._stream)
        try:
            self._module = self._drive("cuModuleLoadData", image)
        except BackendError as error:
            raise BackendError(
                f"the driver (CUDA {self.driver}) does not take the kernels: {error.found}",
                needed="a driver at least as new as the NVRTC that compiled them",
                fix="a newer NVIDIA driver, or for CUDA 12's: pip install 'cuda-bindings<13' nvidia-cuda-nvrtc-cu12",
            ) from error
        self._functions = {name: self._drive("cuModuleGetFunction", self._module, name.encode()) for name in KERNELS}

    # ---- Memory

    def empty(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Return new memory, its contents undefined. Raise DeviceMemoryError where there is not enough."""
        self._refuse_in_capture("memory is taken")
        array = DeviceArray(0, tuple(shape), np.dtype(dtype))
        try:
            pointer = int(self._drive("cuMemAlloc", max(1, array.bytes)))
        except DeviceMemoryError:
            free, total = self.memory()
            raise DeviceMemoryError(
                f"{_mib(array.bytes)} of GPU memory were asked for and {_mib(free)} of {_mib(total)} are free",
                needed="enough free memory on the GPU",
                fix="make fewer or smaller pictures at once, or end what else runs there (nvidia-smi)",
            ) from None
        self._held.add(pointer)
        return DeviceArray(pointer, array.shape, array.dtype)

    def zeros(self, shape: Sequence[int], dtype: Any) -> DeviceArray:
        """Return new memory of zeros."""
        array = self.empty(shape, dtype)
        self.fill_zero(array)
        return array

    def free(self, array: DeviceArray) -> None:
        """Wait for what was queued; free an array of `empty` or `zeros`. After `close`, which frees all, do nothing."""
        if self._drive.context is None:
            return
        self._refuse_in_capture("memory is given back")
        if array.pointer not in self._held:
            raise BackendError(
                "memory that is not held cannot be freed", needed="an array from `empty`", fix="free it once"
            )
        self._drive("cuMemFree", array.pointer)
        self._held.remove(array.pointer)

    def memory(self) -> tuple[int, int]:
        """Return the bytes of the device that are free, and the bytes in all."""
        free, total = self._drive("cuMemGetInfo")
        return free, total

    # ---- What is queued

    def upload(self, array: NDArray[Any], target: DeviceArray) -> None:
        """Queue a copy from the host; the array may be changed as soon as this returns.

        It cannot be captured, since a graph would read the host's memory again at each launch.
        """
        self._refuse_in_capture("the host's memory is read")
        if array.dtype != target.dtype or array.size != math.prod(target.shape):
            raise _misfit(f"an array of {array.dtype} {array.shape}", f"{target.dtype} {target.shape}")
        dense = np.ascontiguousarray(array)
        self._drive("cuMemcpyHtoDAsync", target.pointer, dense.ctypes.data, dense.nbytes, self._stream)
        if self._reads_host_pages:
            self.wait()

    def download(self, source: DeviceArray) -> NDArray[Any]:
        """Wait for all queued work, and return a copy on the host."""
        self._refuse_in_capture("the host waits")
        array = np.empty(source.shape, source.dtype)
        self._drive("cuMemcpyDtoHAsync", array.ctypes.data, source.pointer, array.nbytes, self._stream)
        self.wait()
        return array

    def copy(self, source: DeviceArray, target: DeviceArray) -> None:
        """Queue a copy within the device, of the source's bytes."""
        if source.bytes > target.bytes:
            raise _misfit(f"{source.bytes} bytes", f"at most {target.bytes} bytes")
        self._drive("cuMemcpyDtoDAsync", target.pointer, source.pointer, source.bytes, self._stream)

    def copy_columns(self, source: DeviceArray, target: DeviceArray, column: int) -> None:
        """Queue a copy of a (rows, width) array into the columns from `column` on of a (rows, wider) one."""
        (rows, width), (target_rows, wider) = source.shape, target.shape
        if source.dtype != target.dtype or rows != target_rows or not 0 <= column <= wider - width:
            raise _misfit(
                f"{source.dtype} {source.shape} at column {column}", f"a part of {target.dtype} {target.shape}"
            )
        size = source.dtype.itemsize
        plan = self._drive.api.CUDA_MEMCPY2D()
        plan.srcMemoryType = plan.dstMemoryType = self._drive.api.CUmemorytype.CU_MEMORYTYPE_DEVICE
        plan.srcDevice, plan.srcPitch = source.pointer, width * size
        plan.dstDevice, plan.dstPitch, plan.dstXInBytes = target.pointer, wider * size, column * size
        plan.WidthInBytes, plan.Height = width * size, rows
        self._drive("cuMemcpy2DAsync", plan, self._stream)

    def fill_zero(self, target: DeviceArray) -> None:
        """Queue zeros."""
        self._drive("cuMemsetD8Async", target.pointer, 0, target.bytes, self._stream)

    def launch(self, kernel: str, grid: tuple[int, int], threads: int, arguments: Sequence[Any]) -> None:
        """Queue a kernel of `advance.cu` over (x, y) blocks of `threads` threads each.

        Arguments are ctypes objects, structures too, and are copied before this returns.
        """
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        function, where = self._functions[kernel], ctypes.addressof(addresses)
        self._drive("cuLaunchKernel", function, *grid, 1, threads, 1, 1, 0, self._stream, where, 0)

    def call(self, enqueue: Callable[[], None]) -> None:
        """Call a library's function that queues work on `stream`."""
        self._drive.make_current()
        enqueue()

    def wait(self) -> None:
        """Wait for everything that was queued."""
        self._refuse_in_capture("the host waits")
        self._drive("cuStreamSynchronize", self._stream)

    # ---- Graphs and time

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record instead of running; the graph may be launched once the block has ended. Other threads go on."""
        self._refuse_in_capture("another capture begins")
        graph = Graph(self._drive, self._stream)
        mode = self._drive.api.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._drive("cuStreamBeginCapture", self._stream, mode)
        self._capturing = True
        try:
            yield graph
        except BaseException:
            self._abandon_capture()
            raise
        self._capturing = False
        recorded = self._end_capture()
        try:
            graph.executable = self._drive("cuGraphInstantiate", recorded, 0)
        finally:
            self._drive("cuGraphDestroy", recorded)

    def _end_capture(self) -> Any:
        """Return the recorded graph; a library that did what cannot be recorded is noticed only here."""
        try:
            return self._drive("cuStreamEndCapture", self._stream)
        except DeviceMemoryError:
            raise
        except BackendError as error:
            raise BackendError(
                f"a capture was broken: {error.found}; a network's library took memory, waited, or used another stream",
                needed="calls that only queue work on the stream that is captured",
                fix="queue them one by one: Engine.load(..., capture=False)",
            ) from error

    def _abandon_capture(self) -> None:
        """End a capture that failed. Errors of the driver are ignored here: they follow from the failure."""
        self._capturing = False
        status, recorded = self._drive.api.cuStreamEndCapture(self._stream)
        if int(status) == 0:
            self._drive("cuGraphDestroy", recorded)

    def mark(self) -> Mark:
        """Return a mark in the queue, after everything queued so far; also a point in time, for `milliseconds`."""
        self._refuse_in_capture("time is taken")
        if not self._spare_events:
            self._events.append(self._drive("cuEventCreate", _SLEEP))
            self._spare_events.append(self._events[-1])
        mark = Mark(self._spare_events.pop())
        weakref.finalize(mark, self._spare_events.append, mark.event)
        self._drive("cuEventRecord", mark.event, self._stream)
        return mark

    def wait_for(self, mark: Mark) -> None:
        """Wait until the device has reached a mark."""
        self._drive("cuEventSynchronize", mark.event)

    def milliseconds(self, start: Mark, end: Mark) -> float:
        """Wait for the later mark; return the device's time between the two."""
        self.wait_for(end)
        return float(self._drive("cuEventElapsedTime", start.event, end.event))

    def close(self) -> None:
        """Wait, free what is still held, and release the context; a second time does nothing."""
        if self._drive.context is None:
            return
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        """Release everything; ignore the errors of a lost context."""
        held = [("cuMemFree", pointer) for pointer in self._held]
        held += [("cuEventDestroy", event) for event in self._events]
        held += [("cuModuleUnload", self._module), ("cuStreamDestroy", self._stream)]
        for function, handle in (*held, ("cuDevicePrimaryCtxRelease", self._device)):
            if handle is not None:
                with suppress(BackendError):
                    self._drive(function, handle)
        self._held.clear()
        self._drive.context = None

    def _refuse_in_capture(self, what: str) -> None:
        if self._capturing:
            raise BackendError(f"{what} within a capture", needed="work that only queues", fix="do it before or after")


class Mark:
    """A point in the stream, whose event is used again once the mark is gone."""

    def __init__(self, event: Any) -> None:
        self.event = event


class Graph:
    """Work that was captured once and is launched as a whole, again and again, on the memory it was captured with."""

    def __init__(self, drive: Driver, stream: Any) -> None:
        self._drive, self._stream = drive, stream
        self.executable: Any = None

    def launch(self) -> None:
        """Queue all of it. Raise BackendError before its capture has ended, and after `close`."""
        if self.executable is None:
            raise BackendError(
                "the graph is not captured, or was closed", needed="one whose capture has ended", fix="capture it again"
            )
        self._drive("cuGraphLaunch", self.executable, self._stream)

    def close(self) -> None:
        """Release the graph; a second time does nothing."""
        if self.executable is not None and self._drive.context is not None:
            self._drive("cuGraphExecDestroy", self.executable)
        self.executable = None


def _misfit(found: str, needed: str) -> BackendError:
    return BackendError(
        f"{found} cannot be copied", needed=needed, fix="pass arrays of one dtype and of sizes that fit"
    )


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"
