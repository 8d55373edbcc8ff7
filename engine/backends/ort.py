"""ONNX Runtime: the CPU, or CUDA through its execution provider, on our stream and our memory."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.backends.base import Arrays, DeviceArray, Gpu, check_arrays, check_feeds
from engine.bundle import Bundle
from engine.errors import BackendError, MissingDependencyError, NetworkError
from engine.spec import GraphSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS = {"cpu": {}, "cuda": {"use_tf32": "0"}}
GUIDED_PICTURE = 2  # lanes


class OrtBackend:
    """Runs graphs with ONNX Runtime on "cpu" or "cuda"; a device that is not there is an error.

    On "cuda" ONNX Runtime itself leaves single nodes that have no CUDA kernel (shape arithmetic, as a rule) to the CPU;
    products are kept in full float32 (no TF32).

    Args:
        device: "cpu" or "cuda".
        threads: threads of one network call on the CPU; None for all physical cores.
        gpu: the opened device; its stream and memory are then used, and networks are `DeviceNetwork`s.
        precision: "fp32", or "fp16" for the bundle's half-precision graphs (on a CPU those are the slower ones).
        spin: whether threads wait for each other by spinning within a call. On idle cores that is a fifth faster; where
            other processes hold cores, it is twice as slow. Between calls they never spin.

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
    ) -> None:
        check_device(device)
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads!r}", "a whole number of 1 or more", "pass another threads")
        self.device = device
        self.precision = precision
        self.gpu = gpu
        self.threads = threads
        self.spin = spin

    def load(self, bundle: Bundle, network: str) -> OrtNetwork:
        """Load a network's graph and the weights it points to.

        Raises:
            BackendError: ONNX Runtime cannot load the graph, or would not run it on the device.
        """
        graph = bundle.spec.graph(network, self.precision)
        session = self.session(bundle.path(graph.path), graph.opset)
        return (
            OrtNetwork(session, graph) if self.gpu is None else OrtDeviceNetwork(session, graph, self.gpu, self.device)
        )

    def session(self, path: Path, opset: int) -> Any:
        """An `onnxruntime.InferenceSession` of a graph of that opset, with this backend's options."""
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle networks would steal cores
        provider, settings = PROVIDERS[self.device], dict(PROVIDER_OPTIONS[self.device])
        if self.gpu is not None and self.device == "cuda":
            settings |= {"device_id": str(self.gpu.ordinal), "user_compute_stream": str(self.gpu.stream)}
        try:
            session = ort.InferenceSession(path, options, providers=[(provider, settings)])
        except Exception as error:  # onnxruntime's errors share no base class
            raise BackendError(
                f"ONNX Runtime cannot load {path} ({error})",
                f"a graph of opset {opset} that onnxruntime {ort.__version__} knows",
                "latentrt doctor; then export again, or update onnxruntime",
            ) from error
        if session.get_providers()[0] != provider:
            raise BackendError(
                f"ONNX Runtime fell back to {session.get_providers()[0]} for {path}",
                provider,
                "latentrt doctor",
            )
        return session


def check_device(device: str) -> None:
    """Refuse a device that this ONNX Runtime does not know.

    Raises:
        BackendError: the device is not "cpu" or "cuda", or the installed onnxruntime has no provider for it.
    """
    if device not in PROVIDERS:
        raise BackendError(f"the device is {device!r}", f"one of {', '.join(PROVIDERS)}", "pass another device")
    ort = _onnxruntime()
    providers = ort.get_available_providers()
    if PROVIDERS[device] not in providers:
        raise BackendError(
            f"this ONNX Runtime has only {', '.join(providers)}",
            PROVIDERS[device],
            "pip uninstall onnxruntime && pip install onnxruntime-gpu",
        )
    if device == "cuda":
        ort.preload_dlls()  # CUDA's and cuDNN's libraries where pip put them; by itself it looks elsewhere


class OrtNetwork:
    """One ONNX Runtime session."""

    def __init__(self, session: Any, graph: GraphSpec) -> None:
        self._session = session
        self.graph = graph
        self._outputs = [tensor.name for tensor in graph.outputs]

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the session once.

        Raises:
            NetworkError: the feeds do not fit the signature, or ONNX Runtime fails.
        """
        check_feeds(self.graph, feeds)
        try:
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise _failed(self.graph.path, error) from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Drop the session, and with it its weights."""
        self._session = None


class OrtDeviceNetwork(OrtNetwork):
    """A session that can also read and write the memory of a device, on its stream."""

    best_lanes = GUIDED_PICTURE

    def __init__(self, session: Any, graph: GraphSpec, gpu: Gpu, kind: str) -> None:
        super().__init__(session, graph)
        self.gpu = gpu
        self._kind = kind

    def bind(self, arrays: Mapping[str, DeviceArray]) -> OrtBound:
        """See `DeviceNetwork.bind`. The call is made once, so that what ONNX Runtime allocates is there when a graph is
        captured; the arrays' contents are then those of that call.
        """
        check_arrays(self.graph, arrays)
        binding = self._session.io_binding()
        for tensors, bind in ((self.graph.inputs, binding.bind_input), (self.graph.outputs, binding.bind_output)):
            for tensor in tensors:
                array = arrays[tensor.name]
                bind(tensor.name, self._kind, self.gpu.ordinal, array.dtype.type, array.shape, array.pointer)
        bound = OrtBound(self._session, binding, self.gpu, self.graph.path)
        bound.enqueue()
        return bound


class OrtBound:
    """A session with its arrays."""

    def __init__(self, session: Any, binding: Any, gpu: Gpu, path: str) -> None:
        self._session, self._binding, self._gpu, self._path = session, binding, gpu, path
        self._options = _onnxruntime().RunOptions()
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


def return_freed_pages() -> None:
    """Have glibc give blocks of 64 KiB and more back to the system when they are freed; it holds for the whole process.

    While a session is made, ONNX Runtime frees about as much as it keeps (half-precision weights that it has widened,
    weights that it has repacked); glibc would hold on to it, a sixth of the embedded model's peak memory. The price is
    page faults for every large temporary array.
    """
    mmap_threshold = -3  # M_MMAP_THRESHOLD of mallopt(3)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_threshold, 64 * 1024)


def _failed(path: str, error: Exception) -> NetworkError:
    return NetworkError(f"{path} failed in ONNX Runtime ({error})", "a run without errors", "latentrt doctor")


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported ({error})", "ONNX Runtime", "pip install onnxruntime"
        ) from error
    return onnxruntime
