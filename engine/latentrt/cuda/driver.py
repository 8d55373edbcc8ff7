"""CUDA's driver API: its statuses as errors, and the right context current at every call.

The functions used here have the same Python signatures in cuda-bindings 12.6 and 13.x (in 12.0 to 12.5 the module was
`cuda.cuda`). Nothing but the driver is needed, no toolkit and no runtime library.
"""

from __future__ import annotations

from typing import Any

from latentrt.errors import BackendError, DeviceMemoryError, MissingDependencyError

NEEDED_CUDA = (12, 0)
DRIVERS = "NVIDIA's driver, 580 or newer for CUDA 13, 535 for CUDA 12"

_OUT_OF_MEMORY, _NO_DEVICE = 2, 100
_WITHOUT_CONTEXT = {
    *("cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute"),
    *("cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"),
}


class Driver:
    """Calls functions of the driver API by name.

    Attributes:
        api: `cuda.bindings.driver`, or a stand-in for it, with its structures and enumerations.
        version: the CUDA version that the driver brings, as "13.0".
        context: of the device that the calls are for; None before it is made and after it was released.

    Raises:
        MissingDependencyError: no cuda-bindings.
        BackendError: no driver, no GPU, or a driver that is too old.
    """

    def __init__(self, bindings: Any = None) -> None:
        self.api = _bindings() if bindings is None else bindings
        self.context: Any = None
        self.version = self._start()

    def _start(self) -> str:
        """Initialize the driver; return its CUDA version."""
        try:
            self("cuInit", 0)
        except BackendError as error:
            fix = f"install {DRIVERS}; a container is given its GPUs by: docker run --gpus all"
            raise BackendError(error.found, needed="an NVIDIA GPU that this process may use", fix=fix) from error
        version: int = self("cuDriverGetVersion")
        found = (version // 1000, version % 1000 // 10)
        if found < NEEDED_CUDA:
            raise BackendError(
                f"the driver brings CUDA {found[0]}.{found[1]}",
                needed=f"CUDA {NEEDED_CUDA[0]}.{NEEDED_CUDA[1]} or newer; 13.0 (driver 580) for nvidia-cuda-nvrtc 13",
                fix=f"install {DRIVERS}",
            )
        return f"{found[0]}.{found[1]}"

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Call the driver; return what the function returns besides its status: nothing, one value or a tuple.

        Raises:
            DeviceMemoryError: the device is full.
            BackendError: any other status of the driver, or the device was closed.
        """
        if function not in _WITHOUT_CONTEXT:
            self.make_current()
        try:
            answer = getattr(self.api, function)(*arguments)
        except RuntimeError as error:  # the bindings' way to say that there is no driver, or not this function in it
            raise BackendError(
                f"{function} is not there ({error})",
                needed="an NVIDIA driver for CUDA 12 or newer",
                fix=f"install {DRIVERS}",
            ) from error
        return self._check(function, answer)

    def make_current(self) -> None:
        """Make the context current: that is a state of the calling thread, and other libraries change it."""
        if self.context is None:
            raise BackendError("the GPU was closed", needed="an open one", fix="make another: Gpu(...)")
        self._check("cuCtxSetCurrent", self.api.cuCtxSetCurrent(self.context))

    def _check(self, function: str, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status) == 0:
            return values[0] if len(values) == 1 else tuple(values)
        said = f"{function} says {getattr(status, 'name', status)}"
        if int(status) == _OUT_OF_MEMORY:
            raise DeviceMemoryError(said, needed="free GPU memory", fix="end what else runs there (nvidia-smi)")
        if int(status) == _NO_DEVICE:
            raise BackendError(f"there is no GPU ({said})", needed="an NVIDIA GPU", fix="latentrt doctor")
        raise BackendError(
            said, needed="CUDA_SUCCESS", fix="start the process again: after most errors a context is lost"
        )


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"CUDA's Python bindings are not there ({error})",
            needed="cuda-bindings 12.6 or newer",
            fix="pip install 'latentrt[cuda]'",
        ) from error
    return driver
