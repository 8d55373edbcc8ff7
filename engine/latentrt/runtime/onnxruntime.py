"""ONNX Runtime: the CPU, or CUDA through its execution provider, on latentrt's stream and memory."""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP32, INT8, GraphSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError, MissingDependencyError, NetworkError
from latentrt.runtime import spread
from latentrt.runtime.base import Facts
from latentrt.runtime.machine.cores import usable_cores
from latentrt.runtime.machine.memory import give_back, usual_area
from latentrt.runtime.optimized import WEIGHTS, SavedGraph
from latentrt.runtime.replaced import NONE, Weights, replaced_in, set_weights
from latentrt.runtime.signature import Arrays, check_arrays, check_feeds
from latentrt.runtime.variants import VARIANTS, check_int8, graph_of

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
# No TF32; convolutions are chosen by rule, since trying them out would pick others in every process, and may come
# back in the middle of a capture. SkipLayerNormalization sums squares in float16 unless told to be strict.
STRICT = {"use_tf32": "0", "enable_skip_layer_norm_strict_mode": "1"}
PROVIDER_OPTIONS = {"cpu": {}, "cuda": {**STRICT, "cudnn_conv_algo_search": "HEURISTIC"}}
SHAPE_ARITHMETIC = {
    *("Add", "Cast", "Concat", "Constant", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Mul"),
    *("Range", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where"),
}


class OrtBackend:
    """Runs graphs with ONNX Runtime on "cpu" or "cuda"; a missing device is an error.

    On "cuda" it runs the bundle's half-precision graphs for that provider; only shape arithmetic is left to the CPU:
    any other node that ONNX Runtime would put there is an error. ONNX Runtime does not support that others capture its
    calls in a CUDA graph (it has a capture of its own, of one session), so it is done only on request.

    Args:
        device: "cpu" or "cuda".
        threads: CPU threads of one network call; None for all cores that `usable_cores` counts. Where a batch has as
            many entries, each thread computes its own (see `spread`); otherwise they share each operator.
        gpu: the opened device; its stream and memory are then used, and networks are `DeviceNetwork`s.
        precision: "fp32", or "fp16" for the bundle's half-precision graphs (on a CPU the slower ones; "cuda" has no
            others); on "cpu" also "int8", for a bundle that was exported with it.
        spin: whether threads wait for each other by spinning within a call. On idle cores that is a fifth faster; where
            other processes hold cores, it is twice as slow. Between calls they never spin.
        cache: on "cpu", keep optimized graphs in the user's cache and load those: see `SavedGraph`.
        provider_options: of ONNX Runtime's provider, over those set here; to measure what they do.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        BackendError: the device is unknown, or this ONNX Runtime cannot use it.
    """

    name = "onnxruntime"

    def __init__(
        self,
        device: str = "cpu",
        threads: int | None = None,
        *,
        precision: str = "fp32",
        gpu: Gpu | None = None,
        spin: bool = True,
        cache: bool = False,
        provider_options: Mapping[str, str] | None = None,
    ) -> None:
        check_device(device)
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads!r}", needed="a whole number of 1 or more")
        if (device, precision) not in VARIANTS:
            needed, fix = "fp32, fp16 or int8; on cuda fp16", "pass precision='fp16', or leave it out"
            raise BackendError(f"the precision is {precision!r}", needed=needed, fix=fix)
        if precision == INT8:
            check_int8()
        self.device = device
        self.precision = precision
        self.variants: tuple[str, ...] = VARIANTS[device, precision]
        self.gpu = gpu
        on_gpu, self.threads = gpu is not None, threads or usable_cores()
        exact, cores = not on_gpu and precision == FP32, 1 if on_gpu else self.threads
        adapts = precision != INT8
        self.facts = Facts(
            fixed_lanes=on_gpu, one_stream=on_gpu, exact=exact, replaces=True, adapts=adapts, cores=cores
        )
        self.spin = spin
        self.cache = cache and device == "cpu"
        self.provider_options = dict(provider_options or {})

    def load(self, bundle: Bundle, network: str) -> OrtNetwork:
        """Load a network's graph and the weights it points to.

        Raises:
            BackendError: ONNX Runtime cannot load the graph, or would not run it on the device.
            BundleError: the bundle has no graph for this precision and device.
        """
        graph = graph_of(bundle.spec, network, self.variants, self.precision)
        weights = replaced_in(bundle, graph)
        path, make = bundle.path(graph.path), partial(self.session, opset=graph.opset, weights=weights)
        saved = SavedGraph(bundle, graph, _build()) if self.cache and not weights else None
        session = make(path) if saved is None else saved.session(path, make)
        if self.gpu is None:
            return OrtNetwork(session, graph, self.threads, usual=usual_area(bundle.spec, network))
        return OrtDeviceNetwork(session, graph, self.gpu, self.device)

    def session(
        self, path: Path, opset: int, *, optimize: bool = True, save_to: Path | None = None, weights: Weights = NONE
    ) -> Any:
        """Return an `onnxruntime.InferenceSession` of a graph of that opset, with this backend's options.

        Args:
            path: of the graph.
            opset: of the graph; for the message of an error.
            optimize: False for a graph that was optimized and saved.
            save_to: where to save the optimized graph; the session is then slow, for nothing else.
            weights: see `replaced_in`.
        """
        ort = load_onnxruntime()
        options = self._options()
        if not optimize:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        if save_to is not None:
            options.optimized_model_filepath = str(save_to)
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
            options.add_session_config_entry("session.disable_prepacking", "1")
        set_weights(options, weights)
        provider = PROVIDERS[self.device]
        try:
            session = ort.InferenceSession(path, options, providers=[(provider, self._settings())], enable_fallback=0)
        except Exception as error:  # onnxruntime's errors share no base class
            raise BackendError(
                f"ONNX Runtime cannot load {path} ({error})",
                needed=f"a graph of opset {opset} that onnxruntime {ort.__version__} knows",
                fix="latentrt doctor; then export again, or update onnxruntime",
            ) from error
        if session.get_providers()[0] != provider:
            raise BackendError(
                f"ONNX Runtime would run {path} on {session.get_providers()[0]}",
                needed=f"{provider} with CUDA's and cuDNN's libraries (its log names what is missing)",
                fix="pip install 'onnxruntime-gpu[cuda,cudnn]', or put the libraries on LD_LIBRARY_PATH",
            )
        if self.device == "cuda":
            _check_placement(session, path)
        return session

    def _options(self) -> Any:
        options = load_onnxruntime().SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle networks would steal cores
        if self.gpu is not None:
            options.enable_mem_pattern = False  # it would allocate in the second call, which may be a capture
        if self.device == "cuda":
            options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        return options

    def _settings(self) -> dict[str, str]:
        settings = PROVIDER_OPTIONS[self.device] | self.provider_options
        if self.gpu is not None and self.device == "cuda":
            settings |= {"device_id": str(self.gpu.ordinal), "user_compute_stream": str(self.gpu.stream)}
        return settings


def _check_placement(session: Any, path: Path) -> None:
    """Refuse a graph of which ONNX Runtime would run more than shape arithmetic on the CPU: it copies there and back.

    Raises:
        BackendError: it would; or this ONNX Runtime does not say which nodes it puts there.
    """
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise BackendError(
            "this ONNX Runtime does not tell where it runs nodes", needed="1.24 or newer", fix="update onnxruntime-gpu"
        )
    on_cpu = {
        node.op_type
        for part in session.get_provider_graph_assignment_info()
        if part.ep_name == PROVIDERS["cpu"]
        for node in part.get_nodes()
    }
    if strange := sorted(on_cpu - SHAPE_ARITHMETIC):
        raise BackendError(
            f"ONNX Runtime would run {', '.join(strange)} of {path} on the CPU",
            needed="CUDA kernels for all but shape arithmetic",
            fix="export the checkpoint again, or update onnxruntime-gpu",
        )


def check_device(device: str) -> None:
    """Refuse a device that this ONNX Runtime does not know.

    Raises:
        BackendError: the device is not "cpu" or "cuda", or the installed onnxruntime has no provider for it.
    """
    if device not in PROVIDERS:
        raise BackendError(f"the device is {device!r}", needed=f"one of {', '.join(PROVIDERS)}")
    ort = load_onnxruntime()
    providers = ort.get_available_providers()
    if PROVIDERS[device] not in providers:
        raise BackendError(
            f"this ONNX Runtime has only {', '.join(providers)}",
            needed=PROVIDERS[device],
            fix="pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )
    if device == "cuda":
        with contextlib.redirect_stdout(sys.stderr):  # it prints what it does not find
            ort.preload_dlls()  # CUDA's and cuDNN's libraries where pip put them; by itself it looks elsewhere


class OrtNetwork:
    """One ONNX Runtime session.

    Args:
        session: an `onnxruntime.InferenceSession` of the graph.
        graph: its signature.
        threads: the session's, over which the entries of a batch are spread.
        usual: height times width of the model's own inputs; calls with more than twice that keep no memory after them.
    """

    def __init__(self, session: Any, graph: GraphSpec, threads: int = 1, *, usual: float = math.inf) -> None:
        self._session = session
        self.graph = graph
        self._threads = threads
        self._most_kept = 2 * usual
        self._batch = spread.batch_of(graph)
        self._outputs = [tensor.name for tensor in graph.outputs]

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the session once.

        Raises:
            NetworkError: the feeds do not fit the signature, or ONNX Runtime fails.
        """
        sizes = check_feeds(self.graph, feeds)
        parts = spread.parts_of(sizes[self._batch], self._threads) if self._batch else 1
        large = sizes.get("height", 1) * sizes.get("width", 1) > self._most_kept
        try:
            results = spread.run(self._session, self._outputs, feeds, parts, _shrinking() if large else None)
        except Exception as error:
            raise _failed(self.graph.path, error) from error
        finally:
            if large:
                give_back()
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Drop the session, and with it its weights."""
        self._session = None


class OrtDeviceNetwork(OrtNetwork):
    """A session that can also read and write the memory of a device, on its stream."""

    best_lanes = 1  # none is better than another: those of a picture decide

    def __init__(self, session: Any, graph: GraphSpec, gpu: Gpu, kind: str) -> None:
        super().__init__(session, graph)
        self.gpu = gpu
        self._kind = kind

    def bind(self, arrays: Mapping[str, DeviceArray]) -> OrtBound:
        """See `DeviceNetwork.bind`. One call is made here, so that ONNX Runtime allocates its memory before a graph is
        captured; the arrays' contents are then those of that call.
        """
        check_arrays(self.graph, arrays)
        binding = self._session.io_binding()
        for tensors, bind in ((self.graph.inputs, binding.bind_input), (self.graph.outputs, binding.bind_output)):
            for tensor in tensors:
                array = arrays[tensor.name]
                bind(tensor.name, self._kind, self.gpu.ordinal, array.dtype.type, array.shape, array.pointer)
        bound = OrtBound(self._session, binding, self.gpu, self.graph.path)
        with _only_fatal_logged():
            bound.enqueue()
        return bound


@contextlib.contextmanager
def _only_fatal_logged() -> Iterator[None]:
    """Silence the errors that cuDNN logs for kernels that it tries in a first call and rejects, though others fit."""
    ort = load_onnxruntime()
    ort.set_default_logger_severity(4)
    try:
        yield
    finally:
        ort.set_default_logger_severity(2)  # its own default: warnings


class OrtBound:
    """A session with its arrays."""

    def __init__(self, session: Any, binding: Any, gpu: Gpu, path: str) -> None:
        self._session, self._binding, self._gpu, self._path = session, binding, gpu, path
        self._options = load_onnxruntime().RunOptions()
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def enqueue(self) -> None:
        """See `Bound.enqueue`."""
        self._gpu.call(self._run)

    def _run(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding, self._options)
        except Exception as error:
            raise _failed(self._path, error) from error

    def close(self) -> None:
        """See `Bound.close`."""
        self._session = self._binding = None


def _shrinking() -> Any:
    """Return the options of a call whose memory is given back: the CPU's arena keeps it for good otherwise."""
    options = load_onnxruntime().RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    return options


def _build() -> str:
    """Return what tells one build of ONNX Runtime from others."""
    ort = load_onnxruntime()
    return f"{ort.__version__} {ort.get_build_info()}"


def _failed(path: str, error: Exception) -> NetworkError:
    return NetworkError(
        f"{path} failed in ONNX Runtime ({error})", needed="a run without errors", fix="latentrt doctor"
    )


def load_onnxruntime() -> Any:
    """Return the library, telemetry off: from 1.31 on it would report to its maker and keep an id of the machine."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported ({error})", needed="ONNX Runtime", fix="pip install onnxruntime"
        ) from error
    return onnxruntime
