"""One network becomes one plan: what happens with TensorRT, in the process that `to_tensorrt.py` starts for it."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import DeviceMemoryError, PlanError
from latentrt.runtime.tensorrt.library import Library, open_library
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, PlanKey, PlanRecord
from latentrt_export.plans import timing_cache
from latentrt_export.plans.plan_graph import load_graph, serialized, weights_of
from latentrt_export.plans.plan_memory import peak_here

T = TypeVar("T")
Report = Callable[[str, float], None]  # what TensorRT is doing, and the share that is done
FACTS = {"activations": r"Total Activation Memory: (\d+)", "weights": r"Total Weights Memory: (\d+)"}


@dataclass(frozen=True, slots=True)
class Order:
    """A plan to build: its key, its bundle, and the folder where it will lie.

    `device` is the GPU, as "cuda:0"; empty where none is needed. `workspace` is the most bytes of device memory that a
    tactic may take; None for all that there is. `made` goes into the plan's record.
    """

    key: PlanKey
    bundle: Path
    plans: Path
    device: str = ""
    workspace: int | None = None
    made: dict[str, Any] = field(default_factory=dict)


class Cancelled(Exception):  # noqa: N818
    """The build was asked to stop, and did."""


def build(order: Order, folder: Path, report: Report, cancelled: Callable[[], bool]) -> PlanRecord:
    """Build a plan and put it in its place, whole or not at all.

    Args:
        folder: an empty one, for what is thrown away afterwards.
        report: told about progress, from threads of TensorRT's.
        cancelled: asked at every step whether to stop.

    Raises:
        PlanError: the graph is damaged, TensorRT cannot build it, or there is no room for it.
        DeviceMemoryError: TensorRT ran out of memory.
        BackendError, MissingDependencyError: TensorRT is not there or finds no GPU.
        Cancelled: it was asked to stop.
    """
    start = time.monotonic()
    library = open_library(order.key.library)
    bundle = Bundle.open(order.bundle, check_hashes=False)
    graph = bundle.spec.graph(order.key.network, order.key.precision)
    model = load_graph(bundle, graph, order.key.profiles, library.opset)
    weights = weights_of(model, graph)
    onnx, path = serialized(model, bundle.path(graph.path), folder)
    refit = weights if {STRIPPED, REFITTABLE} & set(order.key.options) else {}
    with _on(order.device) as on_device:
        builder = on_device(lambda: _Builder(library, order))
        plan = on_device(lambda: builder.build(onnx, path, graph, list(refit), report, cancelled))
    if cancelled():
        raise Cancelled
    seconds = round(time.monotonic() - start, 1)
    made = {**order.made, **builder.logger.facts, "seconds": seconds, "host": peak_here(), "opset": library.opset}
    data = memoryview(plan)
    record = PlanRecord(order.key, hashlib.sha256(data).hexdigest(), data.nbytes, refit, made)
    PlanStore(bundle, order.plans).put(record, data)  # type: ignore[arg-type]  # a view: no second copy of gigabytes
    return record


@contextmanager
def _on(device: str) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Call TensorRT with the GPU's context current, where there is a GPU."""
    if not device:
        yield lambda work: work()
        return
    from latentrt.cuda.gpu import Cuda

    gpu = Cuda(device)

    def on_device(work: Callable[[], T]) -> T:
        results: list[T] = []
        gpu.call(lambda: results.append(work()))
        return results[0]

    yield on_device


class _Builder:
    """TensorRT's objects, each kept as long as the others need it."""

    def __init__(self, library: Library, order: Order) -> None:
        self._library, self._order = library, order
        self.logger = _listening(library)
        self._builder = new_builder(library, self.logger)
        self._network = self._builder.create_network(library.network_flags())

    def build(
        self, onnx: bytes, path: Path, graph: GraphSpec, refit: list[str], report: Report, cancelled: Callable[[], bool]
    ) -> Any:
        """The plan's bytes, in memory of TensorRT's."""
        library, key = self._library, self._order.key
        parser = parse(library, self._network, self.logger, onnx, path)
        library.mark_refittable(self._network, refit)
        library.let_attention_decompose(self._network)
        config = self._builder.create_builder_config()
        library.configure(config, key.precision, key.options)
        library.aim(config, key.compute_capability)
        library.limit(config, self._order.workspace)
        library.keep_types(config, self._network)
        for profile in key.profiles:
            ranges = self._builder.create_optimization_profile()
            for tensor in graph.inputs:
                ranges.set_shape(tensor.name, *profile.shapes(tensor))
            config.add_optimization_profile(ranges)
        monitor = _watch(library, config, report, cancelled)
        cache = timing_cache.load(library, config, key)
        plan = self._builder.build_serialized_network(self._network, config)
        del parser, monitor  # both must outlive the build
        if plan is None:
            raise Cancelled if cancelled() else self._failure()
        timing_cache.save(cache, key)
        return plan

    def _failure(self) -> Exception:
        key, library = self._order.key, self._library
        words = self.logger.take_errors() or "it does not say why"
        found = f"{library.name} {library.version} cannot build the {key.network} ({words})"
        if re.search(r"out ?of ?memory", words, re.IGNORECASE):
            return DeviceMemoryError(
                found, needed="more free memory", fix="fewer lanes, a smaller size, or a smaller --workspace"
            )
        return PlanError(
            found, needed="a graph that it can build", fix="latentrt build BUNDLE --check shows what it cannot read"
        )


def new_builder(library: Library, logger: Any) -> Any:
    """TensorRT's builder.

    Raises:
        BackendError: it finds no GPU; TensorRT-RTX needs none.
    """
    return library.builder(logger)


def parse(library: Library, network: Any, logger: Any, onnx: bytes, path: Path) -> Any:
    """Read a graph into a network; the parser must live as long as the network.

    Raises:
        PlanError: it cannot be read; the parser's own words are in it.
    """
    parser = library.module.OnnxParser(network, logger)
    parser.flags = library.parser_flags()
    if not parser.parse(onnx, str(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise PlanError(
            f"{library.name} {library.version} cannot read {path.name} ({errors or logger.take_errors()})",
            needed=f"a graph of operators that it knows, in opset {library.opset}",
            fix="latentrt build BUNDLE --check lists them; or another version of the library",
        )
    return parser


def _listening(library: Library) -> Any:
    """The library's logger, which also keeps what TensorRT says of a plan's memory."""

    class Listening(type(library.logger())):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.facts: dict[str, int] = {}

        def log(self, severity: Any, message: str) -> None:
            super().log(severity, message)
            if severity == library.module.ILogger.Severity.INFO:
                for name, pattern in FACTS.items():
                    if match := re.search(pattern, message):
                        self.facts[name] = int(match.group(1))

    return Listening()


class Phases:
    """How far TensorRT is: it works in phases within phases, each of so many steps."""

    def __init__(self) -> None:
        self._open: list[list[Any]] = []  # name, steps, steps done: from the outermost in
        self._lock = threading.Lock()
        self._share = 0.0

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, within another."""
        with self._lock:
            self._open.append([name, max(steps, 1), 0])

    def step(self, name: str) -> None:
        """A phase is a step further."""
        with self._lock:
            for phase in reversed(self._open):
                if phase[0] == name:
                    phase[2] += 1
                    return

    def finish(self, name: str) -> None:
        """A phase ends, sometimes before all of its steps were told."""
        with self._lock:
            for index in reversed(range(len(self._open))):
                if self._open[index][0] == name:
                    del self._open[index:]
                    return

    @property
    def share(self) -> float:
        """The share that is done, 0 to 1; it never falls."""
        with self._lock:
            share = 0.0
            for _, steps, done in reversed(self._open):
                share = min((done + share) / steps, 1.0)
            self._share = max(self._share, share)
            return self._share


def _watch(library: Library, config: Any, report: Report, cancelled: Callable[[], bool]) -> Any:
    """Have TensorRT tell how far it is, and ask whether to stop; 8.6 can do neither."""
    if not hasattr(library.module, "IProgressMonitor"):
        return None

    class Monitor(library.module.IProgressMonitor):  # type: ignore[misc,name-defined]
        """Nothing may be raised in here: TensorRT's caller is C++ that takes no exceptions."""

        def __init__(self) -> None:
            library.module.IProgressMonitor.__init__(self)
            self.phases = Phases()

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            self.phases.start(name, parent, steps)
            self._tell(name)

        def phase_finish(self, name: str) -> None:
            self.phases.finish(name)

        def step_complete(self, name: str, step: int) -> bool:
            self.phases.step(name)
            return self._tell(name)

        def _tell(self, name: str) -> bool:
            try:
                report(name, self.phases.share)
                return not cancelled()
            except Exception:  # whoever listened is gone
                return False

    config.progress_monitor = Monitor()
    return config.progress_monitor
