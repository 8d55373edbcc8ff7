"""One small seam over TensorRT's flavours: which library is there, and what differs between 8.6, 10, 11, RTX and lean.

Whatever depends on a flavour or version is asked for here by the name of the fact, so that nothing above compares
version numbers. Names that a version lacks are looked up only where that version is at work.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import re
from collections import deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from latentrt.bundle.bundle import Bundle
from latentrt.cuda.driver import DRIVERS
from latentrt.errors import BackendError, MissingDependencyError, PlanError
from latentrt.runtime.tensorrt.plans import weights_digest
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, VERSION_COMPATIBLE, PlanKey

log = logging.getLogger(__name__)


class _Flavour(NamedTuple):
    module: str
    install: str


FLAVOURS = {
    "tensorrt": _Flavour("tensorrt", "pip install 'latentrt[tensorrt]' (Jetson: apt install python3-libnvinfer)"),
    "tensorrt-rtx": _Flavour("tensorrt_rtx", "pip install 'latentrt[tensorrt-rtx]'"),
    "tensorrt-lean": _Flavour("tensorrt_lean", "pip install tensorrt-lean"),
}
LIBRARIES = tuple(FLAVOURS)
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}
BROKEN_REFIT = (11, 3)  # says its own documentation: the bias of a product can get lost
UNTYPED_LAYERS = ("CAST", "CONSTANT", "SHAPE")  # 8.6 takes no precision for them


@dataclass(frozen=True, slots=True)
class Library:
    """A flavour of TensorRT that could be imported.

    `name` is one of LIBRARIES, `version` the whole version ("10.13.3.9"), `numbers` the same as numbers.
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
    def strongly_typed(self) -> bool:
        """Whether a network's own types decide where it computes in half; 8.6 chooses by itself, given leave (FP16)."""
        return self.rtx or self.numbers >= (10,)

    @property
    def narrows_int64(self) -> bool:
        """Whether int64 inputs of a graph become int32 inputs of its plan: 8.6 has no int64."""
        return not self.rtx and self.numbers < (10,)

    @property
    def builds(self) -> bool:
        """Whether it can make plans; the lean runtime only runs them."""
        return hasattr(self.module, "Builder")

    def logger(self) -> Any:
        """A logger for Runtime, Builder and Refitter; it must outlive them. See `_logger_class` for what it adds."""
        return _logger_class(self.module)()

    # Run time

    def runtime(self, logger: Any) -> Any:
        """A runtime that loads no host code, neither from a plan nor through a temporary file.

        Raises:
            BackendError: there is no driver or device that TensorRT can use.
        """
        runtime = self._start("Runtime", logger)
        runtime.engine_host_code_allowed = False
        runtime.tempfile_control_flags = 0
        return runtime

    def dtype(self, dtype: Any) -> np.dtype[Any]:
        """numpy's dtype for one of TensorRT's; its own `nptype` fails under newer numpy in old versions.

        Raises:
            PlanError: numpy has none (bfloat16, fp8, ...).
        """
        if dtype.name not in DTYPES:
            raise PlanError(
                f"a plan has a tensor of {dtype.name}", needed=f"one of {', '.join(DTYPES)}", fix="build it again"
            )
        return np.dtype(DTYPES[dtype.name])

    def contexts(self, engine: Any) -> Callable[[], Any]:
        """A function that makes execution contexts whose device memory is given to them.

        RTX compiles kernels for the shapes at hand: at once, or a captured CUDA graph would keep the slow ones that
        stand in for them. All contexts of an engine share what was compiled.
        """
        if not hasattr(self.module, "ExecutionContextAllocationStrategy"):  # 8.6
            make: Callable[[], Any] = engine.create_execution_context_without_device_memory
            return make
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
        held = config, cache  # nothing promises that either lives on in the contexts
        return lambda: engine.create_execution_context(held[0])

    def memory_needed(self, engine: Any, context: Any) -> int:
        """Bytes of device memory that a context needs for the shapes that were set (8.6: for any shapes)."""
        if hasattr(context, "update_device_memory_size_for_shapes"):
            return int(context.update_device_memory_size_for_shapes())
        return int(engine.device_memory_size)

    def give_memory(self, context: Any, pointer: int, size: int) -> None:
        """Tell a context which device memory is its own during a call; 256-byte aligned."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(pointer, size)
        else:
            context.device_memory = pointer

    # Build time

    def builder(self, logger: Any) -> Any:
        """A builder.

        Raises:
            BackendError: there is no driver or device that TensorRT can use; RTX needs none.
        """
        return self._start("Builder", logger)

    @property
    def opset(self) -> int:
        """The newest opset to hand to the parser. Before 11 it takes no `Attention`, or only one of four axes."""
        newest = hasattr(self.module, "IAttention") if self.rtx else self.numbers >= (11,)
        return 23 if newest else 18

    def network_flags(self) -> int:
        """What `Builder.create_network` needs to make a network with explicit batch, and strong typing where it is."""
        flags = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flags.STRONGLY_TYPED if self.strongly_typed else flags.EXPLICIT_BATCH)

    def parser_flags(self) -> int:
        """What `OnnxParser.flags` must have: InstanceNormalization without a plugin (the default since 10)."""
        return 1 << int(self.module.OnnxParserFlag.NATIVE_INSTANCENORM)

    def configure(self, config: Any, precision: str, options: Collection[str] = ()) -> None:
        """Set the flags of an IBuilderConfig for a precision ("fp16", "fp32") and the options of a plan's key.

        Products of float32 are kept in float32 (no TF32), as on every other backend.

        Raises:
            PlanError: this version cannot build such a plan.
        """
        flag = self.module.BuilderFlag
        config.clear_flag(flag.TF32)
        if precision == "fp16" and not self.strongly_typed:
            config.set_flag(flag.FP16)
        if self.rtx:
            config.set_flag(flag.REQUIRE_USER_ALLOCATION)  # enqueueing allocates nothing, so that it can be captured
        for name in self.option_flags(options):
            config.set_flag(getattr(flag, name))
        if self.numbers < (10,) and not self.rtx:
            sources = self.module.TacticSource  # neither cuBLAS nor cuDNN has to be there
            config.set_tactic_sources(1 << int(sources.EDGE_MASK_CONVOLUTIONS) | 1 << int(sources.JIT_CONVOLUTIONS))
            config.set_preview_feature(self.module.PreviewFeature.PROFILE_SHARING_0806, True)  # several contexts

    def option_flags(self, options: Collection[str]) -> list[str]:
        """The names of the builder flags of a key's options.

        Weights that are set later are marked one by one (`mark_refittable`): all others, which no safetensors of a
        bundle holds, stay in the plan.

        Raises:
            PlanError: this version cannot build such a plan.
        """
        flags = []
        if STRIPPED in options:
            flags += ["STRIP_PLAN"]
        if {STRIPPED, REFITTABLE} & set(options):
            flags += ["REFIT_INDIVIDUAL"]
        if VERSION_COMPATIBLE in options:  # without the lean runtime a plan carries no host code
            flags += ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
        self._check_options(options, flags)
        return flags

    @property
    def compute_capabilities(self) -> tuple[str, ...]:
        """What RTX can build for without the GPU, as "8.9"; nothing for the others."""
        names = self.module.ComputeCapability.__members__ if self.rtx else {}
        return tuple(f"{name[2:-1]}.{name[-1]}" for name in names if name.startswith("SM"))

    def aim(self, config: Any, compute_capability: str) -> None:
        """Build for a compute capability; TensorRT builds for the GPU at hand and is not asked."""
        if self.rtx:
            capability = getattr(self.module.ComputeCapability, f"SM{compute_capability.replace('.', '')}")
            config.num_compute_capabilities = 1
            config.set_compute_capability(capability, 0)

    def limit(self, config: Any, workspace: int | None) -> None:
        """Bound the memory of a tactic, and where the version has it, of trying tactics too."""
        pools = self.module.MemoryPoolType
        for pool in ("WORKSPACE", "TACTIC_DRAM"):
            if workspace is not None and hasattr(pools, pool):
                config.set_memory_pool_limit(getattr(pools, pool), workspace)

    def mark_refittable(self, network: Any, names: Iterable[str]) -> None:
        """Let weights of a parsed network be set in its plan, by the names that they have in the graph.

        Raises:
            PlanError: the network has no such weight.
        """
        for name in names:
            if not network.mark_weights_refittable(name):
                raise PlanError(
                    f"the network has no weight {name}", needed="every weight of the graph", fix="export it again"
                )

    def let_attention_decompose(self, network: Any) -> None:
        """Let every attention be built from several kernels where no fused one exists; else the build fails there."""
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type.name == "ATTENTION_INPUT":
                layer.__class__ = self.module.IAttentionInputLayer
                layer.attention.decomposable = True

    def keep_types(self, config: Any, network: Any) -> None:
        """Hold 8.6 to the types of the graph, where it computes in float32; since 10, networks are strongly typed."""
        if self.strongly_typed:
            return
        config.set_flag(self.module.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            if layer.type.name not in UNTYPED_LAYERS and any(out.dtype == self.module.float32 for out in outputs):
                layer.precision = self.module.float32
                for i, output in enumerate(outputs):
                    layer.set_output_type(i, output.dtype)

    def _start(self, kind: str, logger: Any) -> Any:
        """Make a Runtime or Builder. Where there is no driver, that is a null pointer in disguise: an error was logged,
        and the process crashes if it is used or destroyed, so it never is.
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

    def _check_options(self, options: Collection[str], flags: list[str]) -> None:
        asked = f"{self.name} {self.version} was asked for a plan that is {' and '.join(options)}"
        lacking = [name for name in flags if not hasattr(self.module.BuilderFlag, name)]
        if lacking:
            raise PlanError(
                asked, needed=f"a version that has {lacking[0]}", fix="update it, or build without that option"
            )
        if VERSION_COMPATIBLE in options and self.rtx:
            raise PlanError(asked, needed="plans for this very version", fix="build without --version-compatible")
        if VERSION_COMPATIBLE in options and {STRIPPED, REFITTABLE} & set(options):
            raise PlanError(
                asked, needed="one of the two: the lean runtime cannot refit", fix="leave one of the options out"
            )
        if {STRIPPED, REFITTABLE} & set(options) and self.numbers[:2] == BROKEN_REFIT:
            raise PlanError(asked, needed="a version whose refittable plans compute right: not 11.3", fix="update it")


def open_library(name: str) -> Library:
    """Import a flavour of TensorRT.

    Raises:
        BackendError: the name is unknown.
        MissingDependencyError: it, or a shared library that it needs, is not there.
    """
    if name not in FLAVOURS:
        raise BackendError(f"there is no library {name!r}", needed=f"one of {', '.join(LIBRARIES)}")
    flavour = FLAVOURS[name]
    try:
        module = importlib.import_module(flavour.module)
    except (ImportError, OSError, RuntimeError) as error:
        lacking = re.search(r"lib[\w+-]+\.so[.\d]*", str(error))
        needed = f"the shared library {lacking.group()}" if lacking else f"the Python package {flavour.module}"
        raise MissingDependencyError(
            f"{flavour.module} cannot be imported ({error})", needed=needed, fix=flavour.install
        ) from error
    version = str(module.__version__)
    return Library(name, module, version, tuple(int(part) for part in re.findall(r"\d+", version)[:4]))


class Device(Protocol):
    """What a plan's key tells of a GPU: a `Gpu`, or one that is not here."""

    name: str
    compute_capability: tuple[int, int]
    driver: str


def wanted_key(bundle: Bundle, network: str, precision: str, library: Library, gpu: Device) -> PlanKey:
    """The key of a plan that serves a network here and now, without options and profiles.

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
    """A logger class of a module: it keeps errors, so that exceptions can quote them, and is quiet about the rest.

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
            """TensorRT's own words since they were last taken, oldest first; empty if there were none."""
            errors = [self._errors.popleft() for _ in range(len(self._errors))]
            return "; ".join(dict.fromkeys(errors))

    return KeepingLogger
