"""The differences between TensorRT's flavours: which library is installed, and how 10, 11, RTX and lean differ.

Code asks here for a property by its name, so that no other module compares flavours or version numbers; what matters
only when plans are built is in latentrt_export/plans/building.py. Names that a version lacks are looked up only where
that version is in use.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from latentrt.bundle.bundle import Bundle
from latentrt.cuda.driver import DRIVERS
from latentrt.errors import BackendError, MissingDependencyError, PlanError
from latentrt.runtime.tensorrt.plans import weights_digest
from latentrt.runtime.tensorrt.record import PlanKey

log = logging.getLogger(__name__)


INSTALL = {
    "tensorrt": "pip install 'latentrt[tensorrt]' (Jetson: apt install python3-libnvinfer)",
    "tensorrt-rtx": "pip install 'latentrt[tensorrt-rtx]'",
    "tensorrt-lean": "pip install tensorrt-lean",
}
LIBRARIES = tuple(INSTALL)
OLDEST = 10  # the first TensorRT with int64 and strong typing; RTX counts for itself
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


@dataclass(frozen=True, slots=True)
class Library:
    """An installed flavour of TensorRT.

    Attributes:
        name: one of LIBRARIES.
        module: the Python module.
        version: the whole version ("10.13.3.9").
        numbers: the same as integers.
    """

    name: str
    module: Any
    version: str
    numbers: tuple[int, ...]

    @property
    def rtx(self) -> bool:
        """Whether kernels are compiled where the plan runs; its version numbers are its own (1.x)."""
        return self.name == "tensorrt-rtx"

    @property
    def builds(self) -> bool:
        """Whether it can make plans; the lean runtime only runs them."""
        return hasattr(self.module, "Builder")

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """The GPUs that RTX knows, as "8.9"; empty for the others, which know the GPU that they run on."""
        names = self.module.ComputeCapability.__members__ if self.rtx else {}
        return tuple(f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM"))

    def logger(self) -> Any:
        """Return a logger for Runtime, Builder and Refitter, which it must outlive; see `take_errors` there."""
        return _logger_class(self.module)()

    def runtime(self, logger: Any) -> Any:
        """Return a runtime that loads no host code, neither from a plan nor through a temporary file.

        Raises:
            BackendError: there is no driver or device that TensorRT can use.
        """
        runtime = self._start("Runtime", logger)
        runtime.engine_host_code_allowed = False
        runtime.tempfile_control_flags = 0
        return runtime

    def builder(self, logger: Any) -> Any:
        """Return a builder.

        Raises:
            BackendError: there is no driver or device that TensorRT can use; RTX needs none.
        """
        return self._start("Builder", logger)

    def dtype(self, dtype: Any) -> np.dtype[Any]:
        """Return numpy's dtype for one of TensorRT's, whose own `nptype` fails under newer numpy in old versions.

        Raises:
            PlanError: numpy has none (bfloat16, fp8, ...).
        """
        if dtype.name not in DTYPES:
            raise PlanError(f"a plan has a tensor of {dtype.name}", needed=f"one of {', '.join(DTYPES)}")
        return np.dtype(DTYPES[dtype.name])

    def contexts(self, engine: Any) -> Callable[[], Any]:
        """Return a function that makes execution contexts whose device memory the caller provides.

        RTX compiles kernels for the shapes at hand: at once, or a captured CUDA graph would keep the slow ones that
        stand in for them. All contexts of an engine share what was compiled.
        """
        strategy = self.module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not self.rtx:
            return lambda: engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        config.dynamic_shapes_kernel_specialization_strategy = (
            self.module.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        cache = config.create_runtime_cache()
        config.set_runtime_cache(cache)
        held = config, cache  # the library may need both as long as the contexts
        return lambda: engine.create_execution_context(held[0])

    def _start(self, kind: str, logger: Any) -> Any:
        """Make a Runtime or Builder. Without a driver TensorRT logs an error and returns a null pointer in disguise:
        the process crashes where it is used or destroyed, so it never is.
        """
        try:
            made = getattr(self.module, kind)(logger)
            words = logger.take_errors()
        except TypeError as error:  # some versions raise instead
            made, words = None, logger.take_errors() or str(error)
        if words:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(made))
            raise BackendError(
                f"{self.name} {self.version} cannot start ({words})",
                needed="an NVIDIA GPU and a driver that is new enough",
                fix=f"install {DRIVERS}, or the wheels for your driver: pip install {self.name}-cu12",
            )
        return made


def open_library(name: str) -> Library:
    """Import a flavour of TensorRT.

    Raises:
        BackendError: the name is unknown.
        MissingDependencyError: it, or a shared library that it needs, is not installed, or it is older than 10.
    """
    if name not in LIBRARIES:
        raise BackendError(f"there is no library {name!r}", needed=f"one of {', '.join(LIBRARIES)}")
    package = name.replace("-", "_")
    try:
        module = importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        lacking = re.search(r"lib[\w+-]+\.so[.\d]*", str(error))
        needed = f"the shared library {lacking.group()}" if lacking else f"the Python package {package}"
        raise MissingDependencyError(
            f"{package} cannot be imported ({error})", needed=needed, fix=INSTALL[name]
        ) from error
    version = str(module.__version__)
    library = Library(name, module, version, tuple(int(part) for part in re.findall(r"\d+", version)[:4]))
    if not library.rtx and library.numbers < (OLDEST,):
        raise MissingDependencyError(f"{name} is {version}", needed=f"{OLDEST} or newer", fix=INSTALL[name])
    return library


class Device(Protocol):
    """The properties of a GPU in a plan's key: of a `Gpu`, or of one that is not in this machine."""

    name: str
    compute_capability: tuple[int, int]
    driver: str


def wanted_key(bundle: Bundle, network: str, precision: str, library: Library, gpu: Device) -> PlanKey:
    """Return the key of a plan that serves a network on this device, without options and profiles.

    Raises:
        BundleError: the bundle has no such network in that precision ("fp16", "fp32").
    """
    graph = bundle.spec.graph(network, precision)
    return PlanKey(
        network=network,
        graph=bundle.files[graph.path].sha256,
        weights=weights_digest(bundle, graph),
        precision=precision,
        library=library.name,
        version=library.version,
        gpu=gpu.name,
        compute_capability="{}.{}".format(*gpu.compute_capability),
        driver=gpu.driver,
    )


def _logger_class(module: Any) -> type[Any]:
    """Return a logger class of a module: it keeps errors, so that exceptions can quote them, and logs the rest quietly.

    TensorRT logs from threads of its own; a deque takes that.
    """

    class KeepingLogger(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self._errors: deque[str] = deque(maxlen=20)

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.Severity.ERROR, module.ILogger.Severity.INTERNAL_ERROR):
                self._errors.append(message.strip())
            level = logging.INFO if severity == module.ILogger.Severity.WARNING else logging.DEBUG
            log.log(level, "%s", message)

        def take_errors(self) -> str:
            """Return TensorRT's own messages since the last call, oldest first; empty if there were none."""
            errors = [self._errors.popleft() for _ in range(len(self._errors))]
            return "; ".join(dict.fromkeys(errors))

    return KeepingLogger
