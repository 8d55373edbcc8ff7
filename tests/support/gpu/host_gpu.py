"""A GPU for machines without one: the real `Gpu` and the real `advance.cu`, over a driver made of host memory.

The kernels run on the CPU (host_kernels.py). Pointers are real addresses, so numpy can look into "device" memory.
Queued work runs at once; captured work is recorded and replayed, with the arguments of its capture.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from tests.support.gpu.host_kernels import Launch, host_library


class Status(enum.IntEnum):
    """The needed part of CUresult."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


OK = Status.CUDA_SUCCESS
# As in CUDA, these may not be called by a thread that captures; one that is invalidates the capture.
UNSAFE = {"cuMemAlloc", "cuMemFree", "cuStreamSynchronize", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync"}
MEMCPY2D = (
    *("srcMemoryType", "srcDevice", "srcPitch", "dstMemoryType", "dstDevice", "dstPitch", "dstXInBytes"),
    *("WidthInBytes", "Height"),
)


class HostDriver:
    """`cuda.bindings.driver`, as far as `Gpu` needs it, in host memory.

    Attributes:
        calls: the names of the functions that were called, in order.
        failing: the status that a function returns instead of doing anything.
        in_use: bytes that are allocated.
        alive: how many of each kind of handle have not been destroyed.

    Args:
        memory: bytes of the device.
        devices: the number of devices.
        version: as cuDriverGetVersion counts.
        host_pages: whether it copies from the host's own pages.
    """

    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUmemorytype = SimpleNamespace(CU_MEMORYTYPE_DEVICE=2)
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76,
        CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES=100,
    )

    def __init__(self, memory: int = 2**30, devices: int = 1, version: int = 13000, host_pages: bool = False) -> None:
        self.total, self.devices, self.version = memory, devices, version
        self.attributes = {75: 9, 76: 0, 100: int(host_pages)}
        self.calls: list[str] = []
        self.failing: dict[str, Status] = {}
        self.alive: dict[str, int] = dict.fromkeys(("context", "stream", "module", "graph", "executable", "event"), 0)
        self._blocks: dict[int, ctypes.Array[Any]] = {}
        self._recorded: list[Callable[[], None]] | None = None
        self._invalid = False
        self._handles: dict[int, Any] = {}

    @property
    def in_use(self) -> int:
        return sum(map(len, self._blocks.values()))

    def __getattribute__(self, name: str) -> Any:
        """Record every call of the API, and let the chosen ones fail."""
        found = object.__getattribute__(self, name)
        if not name.startswith("cu"):
            return found

        def called(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append(name)
            if name in self.failing:
                return (self.failing[name], None)
            if self._recorded is not None and name in UNSAFE:
                self._invalid = True
                return (Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None)
            answer: tuple[Any, ...] = found(*arguments)
            return answer

        return called

    # ---- Device

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802 (names are CUDA's)
        return (OK if self.devices else Status.CUDA_ERROR_NO_DEVICE,)

    def cuDriverGetVersion(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.version

    def cuDeviceGetCount(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, ordinal

    def cuDeviceGetName(self, length: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, b"Host GPU".ljust(length, b"\0")

    def cuDeviceGetAttribute(self, attribute: int, device: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.attributes[int(attribute)]

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._make("context")

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Any, ...]:  # noqa: N802
        self.alive["context"] -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK,)

    def cuModuleLoadData(self, image: bytes) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._make("module")

    def cuModuleUnload(self, module: int) -> tuple[Any, ...]:  # noqa: N802
        return self._destroy("module", module)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._handle(getattr(host_library(), f"bind_{name.decode()}"))

    def cuStreamCreate(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._make("stream")

    def cuStreamDestroy(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._destroy("stream", stream)

    def cuStreamSynchronize(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK,)

    # ---- Memory

    def cuMemGetInfo(self) -> tuple[Any, ...]:  # noqa: N802
        return OK, self.total - self.in_use, self.total

    def cuMemAlloc(self, size: int) -> tuple[Any, ...]:  # noqa: N802
        if size < 1:
            return Status.CUDA_ERROR_INVALID_VALUE, None
        if size > self.total - self.in_use:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, None
        memory = (ctypes.c_char * (size + 255))()
        block = (ctypes.c_char * size).from_buffer(memory, -ctypes.addressof(memory) % 256)  # aligned as CUDA's is
        ctypes.memset(block, 0xA5, size)  # no caller may count on zeros
        self._blocks[ctypes.addressof(block)] = block
        return OK, ctypes.addressof(block)

    def cuMemFree(self, pointer: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK if self._blocks.pop(pointer, None) else Status.CUDA_ERROR_INVALID_VALUE,)

    def cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._queue(lambda: ctypes.memmove(target, source, size), (target, size))

    def cuMemcpyDtoHAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._queue(lambda: ctypes.memmove(target, source, size), (source, size))

    def cuMemcpyDtoDAsync(self, target: int, source: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._queue(lambda: ctypes.memmove(target, source, size), (source, size), (target, size))

    def cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return self._queue(lambda: ctypes.memset(target, value, size), (target, size))

    def CUDA_MEMCPY2D(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(**dict.fromkeys(MEMCPY2D, 0))

    def cuMemcpy2DAsync(self, plan: Any, stream: int) -> tuple[Any, ...]:  # noqa: N802
        first, start = int(plan.srcDevice), int(plan.dstDevice) + plan.dstXInBytes
        rows, width = plan.Height, plan.WidthInBytes
        from_to = [(first + row * plan.srcPitch, start + row * plan.dstPitch) for row in range(rows)]

        def run() -> None:
            for source, target in from_to:
                ctypes.memmove(target, source, width)

        return self._queue(run, *((address, width) for pair in from_to for address in pair))

    # ---- Work

    def cuLaunchKernel(self, function: int, *rest: int) -> tuple[Any, ...]:  # noqa: N802
        x, y, _, threads, _, _, _, _, parameters, _ = rest
        if min(x, y, threads) < 1 or threads > 1024 or y > 65535:
            return (Status.CUDA_ERROR_INVALID_VALUE,)
        return self._queue(Launch(self._handles[function], parameters, x, y, threads))

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Any, ...]:  # noqa: N802
        self._recorded, self._invalid = [], False
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Any, ...]:  # noqa: N802
        recorded, self._recorded = self._recorded, None
        if self._invalid:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        return OK, self._make("graph", recorded)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._make("executable", self._handles[graph])

    def cuGraphDestroy(self, graph: int) -> tuple[Any, ...]:  # noqa: N802
        return self._destroy("graph", graph)

    def cuGraphLaunch(self, executable: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        for run in self._handles[executable]:
            run()
        return (OK,)

    def cuGraphExecDestroy(self, executable: int) -> tuple[Any, ...]:  # noqa: N802
        return self._destroy("executable", executable)

    def cuEventCreate(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, self._make("event")

    def cuEventRecord(self, event: int, stream: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK,)

    def cuEventSynchronize(self, event: int) -> tuple[Any, ...]:  # noqa: N802
        return (OK,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[Any, ...]:  # noqa: N802
        return OK, float(end - start)

    def cuEventDestroy(self, event: int) -> tuple[Any, ...]:  # noqa: N802
        return self._destroy("event", event)

    # ---- Not CUDA's

    def record(self, run: Callable[[], None]) -> None:
        """Run a function in the stream's order: now, or at each launch of the graph that is being captured."""
        self._queue(run)

    def _queue(self, run: Callable[[], object], *ranges: tuple[int, int]) -> tuple[Any, ...]:
        if not all(map(self._is_device, ranges)):
            return (Status.CUDA_ERROR_ILLEGAL_ADDRESS,)
        if self._recorded is None:
            run()
        else:
            self._recorded.append(run)
        return (OK,)

    def _is_device(self, part: tuple[int, int]) -> bool:
        start, size = part
        return any(block <= start and start + size <= block + len(data) for block, data in self._blocks.items())

    def _make(self, kind: str, held: Any = None) -> int:
        self.alive[kind] += 1
        return self._handle(held)

    def _handle(self, held: Any) -> int:
        handle = len(self._handles) + 1
        self._handles[handle] = held
        return handle

    def _destroy(self, kind: str, handle: int) -> tuple[Any, ...]:
        self._handles[handle] = None
        self.alive[kind] -= 1
        return (OK,)


class HostGpu(Gpu):
    """`Gpu` over a `HostDriver`, which is `host`; arguments are the driver's."""

    def __init__(self, **options: Any) -> None:
        self.host = HostDriver(**options)
        super().__init__("cuda", self.host, lambda _: b"")

    @property
    def in_use(self) -> int:
        """Bytes that are allocated."""
        return self.host.in_use

    def call(self, enqueue: Callable[[], None]) -> None:
        """Queue a Python function, as a library would queue its kernels: captured, it runs at each launch."""
        self.host.record(enqueue)


@contextmanager
def host_gpu(**options: Any) -> Iterator[HostGpu]:
    """Yield a GPU whose memory must all be freed by the end."""
    gpu = HostGpu(**options)
    yield gpu
    assert gpu.in_use == 0, f"{gpu.in_use} bytes leak"
    gpu.close()
    assert not any(gpu.host.alive.values()), gpu.host.alive


def view(array: DeviceArray) -> NDArray[Any]:
    """Return the memory of a HostGpu's array as a numpy array, not a copy."""
    buffer = (ctypes.c_char * max(1, array.bytes)).from_address(array.pointer)
    return np.frombuffer(buffer, array.dtype, count=array.bytes // array.dtype.itemsize).reshape(array.shape)


def normal_arguments(array: Any, seed: int = 1) -> tuple[Any, ...]:
    """Return arguments for the kernel that fills an array with noise."""
    counts = ctypes.c_int(array.bytes // 4), ctypes.c_uint(256), ctypes.c_ulonglong(seed), ctypes.c_ulonglong(0)
    return ctypes.c_void_p(array.pointer), *counts
