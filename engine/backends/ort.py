"""ONNX Runtime: the CPU, or CUDA through its execution provider."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from engine.backends.base import Arrays, check_feeds
from engine.bundle import Bundle
from engine.errors import BackendError, MissingDependencyError, NetworkError
from engine.spec import GraphSpec

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
PROVIDER_OPTIONS = {"cpu": {}, "cuda": {"use_tf32": "0"}}


class OrtBackend:
    """Runs graphs with ONNX Runtime on "cpu" or "cuda"; a device that is not there is an error.

    On "cuda" ONNX Runtime itself leaves single nodes that have no CUDA kernel (shape arithmetic, as a rule) to the CPU;
    products are kept in full float32 (no TF32).

    Args:
        device: "cpu" or "cuda".
        threads: threads of one network call on the CPU; None for all physical cores.
        precision: "fp32", or "fp16" for the bundle's half-precision graphs (on a CPU those are the slower ones).
        spin: whether threads wait for each other by spinning within a call. On idle cores that is a fifth faster; where
            other processes hold cores, it is twice as slow. Between calls they never spin.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        BackendError: the device is unknown, or this ONNX Runtime cannot use it.
    """

    name = "onnxruntime"

    def __init__(
        self, device: str = "cpu", threads: int | None = None, *, precision: str = "fp32", spin: bool = True
    ) -> None:
        ort = _onnxruntime()
        if device not in PROVIDERS:
            raise BackendError(f"the device is {device!r}", f"one of {', '.join(PROVIDERS)}", "pass another device")
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads!r}", "a whole number of 1 or more", "pass another threads")
        if PROVIDERS[device] not in ort.get_available_providers():
            raise BackendError(
                f"this ONNX Runtime has only {', '.join(ort.get_available_providers())}",
                PROVIDERS[device],
                "pip uninstall onnxruntime && pip install onnxruntime-gpu",
            )
        self.device = device
        self.precision = precision
        self.threads = threads
        self.spin = spin

    def load(self, bundle: Bundle, network: str) -> OrtNetwork:
        """Load a network's graph and the weights it points to.

        Raises:
            BackendError: ONNX Runtime cannot load the graph, or would not run it on the device.
        """
        graph = bundle.spec.graph(network, self.precision)
        return OrtNetwork(self.session(bundle.path(graph.path), graph.opset), graph)

    def session(self, path: Path, opset: int) -> Any:
        """An `onnxruntime.InferenceSession` of a graph of that opset, with this backend's options."""
        ort = _onnxruntime()
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = self.threads or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(self.spin)))
        options.add_session_config_entry("session.force_spinning_stop", "1")  # idle networks would steal cores
        provider = PROVIDERS[self.device]
        try:
            session = ort.InferenceSession(path, options, providers=[(provider, PROVIDER_OPTIONS[self.device])])
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


class OrtNetwork:
    """One ONNX Runtime session."""

    def __init__(self, session: Any, graph: GraphSpec) -> None:
        self._session = session
        self._graph = graph
        self._outputs = [tensor.name for tensor in graph.outputs]

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the session once.

        Raises:
            NetworkError: the feeds do not fit the signature, or ONNX Runtime fails.
        """
        check_feeds(self._graph, feeds)
        try:
            results = self._session.run(self._outputs, dict(feeds))
        except Exception as error:
            raise NetworkError(
                f"{self._graph.path} failed in ONNX Runtime ({error})",
                "a run without errors",
                "latentrt doctor",
            ) from error
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Drop the session, and with it its weights."""
        self._session = None


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


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"onnxruntime cannot be imported ({error})", "ONNX Runtime", "pip install onnxruntime"
        ) from error
    return onnxruntime
