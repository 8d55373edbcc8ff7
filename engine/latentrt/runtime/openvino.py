"""OpenVINO: Intel's runtime, on the CPU, an Intel GPU or an NPU. It reads the bundle's own graphs."""

from __future__ import annotations

import sys
from threading import local
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP16, FP32, GraphSpec
from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError, MissingDependencyError, NetworkError
from latentrt.runtime.base import Facts
from latentrt.runtime.signature import Arrays, check_feeds

HINTS = {FP32: "f32", FP16: "f16"}  # OpenVINO would compute in bfloat16 or float16 where a device is faster so
TELEMETRY = "openvino_telemetry"  # a package that openvino requires


class OpenVinoBackend:
    """Runs graphs with OpenVINO; a missing device is an error.

    Args:
        device: "cpu", "gpu" or "npu", or one of several: "gpu.1".
        threads: threads of one network call on the CPU; None for all physical cores.
        precision: "fp32", or "fp16" for the bundle's half-precision graphs. On the CPU both compute in float32.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        BackendError: this OpenVINO has no such device.
    """

    name = "openvino"
    gpu: Gpu | None = None

    def __init__(self, device: str = "cpu", threads: int | None = None, *, precision: str = FP32) -> None:
        self._library = load_openvino()
        self._core = self._library.Core()
        devices = [name.lower() for name in self._core.available_devices]
        if device not in {*devices, *(name.partition(".")[0] for name in devices)}:  # several GPUs are gpu.0, gpu.1
            raise BackendError(f"OpenVINO has the devices {', '.join(devices)}", needed=device)
        if threads is not None and threads < 1:
            raise BackendError(f"threads is {threads!r}", needed="a whole number of 1 or more")
        self.device, self.threads, self.precision = device, threads, precision
        self.variants: tuple[str, ...] = (precision,)
        self.facts = Facts(exact=device == "cpu" and precision == FP32)

    def load(self, bundle: Bundle, network: str) -> OpenVinoNetwork:
        """Compile a network's graph for the device.

        Raises:
            BackendError: OpenVINO cannot read or compile the graph; the message names operators that it does not know.
            BundleError: the bundle has no graph of this precision.
        """
        graph = bundle.spec.graph(network, *self.variants)
        path = bundle.path(graph.path)
        try:
            compiled = self._core.compile_model(self._core.read_model(path), self.device.upper(), self._settings())
        except Exception as error:  # RuntimeError and others, by what is wrong
            raise BackendError(
                f"OpenVINO cannot load {path} on {self.device} ({error})",
                needed=f"a graph of opset {graph.opset} that openvino {self._library.__version__} knows",
                fix="update openvino, or export again; onnxruntime runs every bundle",
            ) from error
        return OpenVinoNetwork(compiled, graph)

    def _settings(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": HINTS[self.precision]}
        if self.device == "cpu":
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "NUM_STREAMS": 1, "ENABLE_CPU_PINNING": False}
            settings |= {} if self.threads is None else {"INFERENCE_NUM_THREADS": self.threads}
        return settings


class OpenVinoNetwork:
    """One compiled graph. Each thread that calls it has a request, with memory, of its own."""

    def __init__(self, compiled: Any, graph: GraphSpec) -> None:
        self._compiled = compiled
        self._own = local()
        self.graph = graph

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once.

        Raises:
            NetworkError: the feeds do not fit the signature, or OpenVINO fails.
        """
        check_feeds(self.graph, feeds)
        if not hasattr(self._own, "request"):
            self._own.request = self._compiled.create_infer_request()
        try:
            results = self._own.request.infer({name: np.ascontiguousarray(feeds[name]) for name in feeds})
        except Exception as error:
            raise NetworkError(
                f"{self.graph.path} failed in OpenVINO ({error})", needed="a run without errors", fix="latentrt doctor"
            ) from error
        return {tensor.name: results[tensor.name] for tensor in self.graph.outputs}

    def close(self) -> None:
        """Drop the compiled graph, and with it its weights."""
        self._compiled = None
        self._own = local()


def load_openvino() -> Any:
    """Return the library, telemetry off: its import would report to its maker and keep an id of the machine.

    Raises:
        MissingDependencyError: it cannot be imported.
    """
    found = sys.modules.get(TELEMETRY, ...)
    try:
        sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # as if not installed: openvino has a stand-in for it
        import openvino
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            f"openvino cannot be imported ({error})", needed="OpenVINO", fix="pip install 'latentrt[openvino]'"
        ) from error
    finally:
        if found is ...:
            del sys.modules[TELEMETRY]
        else:
            sys.modules[TELEMETRY] = found
    return openvino
