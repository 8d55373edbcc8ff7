"""Build one plan from one network with TensorRT, in the process that `build_process.py` starts for it."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import ADD_ONS, GraphSpec
from latentrt.errors import DeviceMemoryError, PlanError
from latentrt.runtime.tensorrt.library import Library, open_library
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, PlanKey, PlanRecord
from latentrt_export.plans import building, timing_cache
from latentrt_export.plans.plan_graph import load_graph, serialized, weights_of
from latentrt_export.plans.plan_memory import peak_here
from latentrt_export.plans.progress import Report, watch

T = TypeVar("T")
FACTS = {"activations": r"Total Activation Memory: (\d+)", "weights": r"Total Weights Memory: (\d+)"}


@dataclass(frozen=True, slots=True)
class Order:
    """A plan to build.

    Attributes:
        key: everything that it depends on.
        bundle: the bundle, with the graph in its spec.
        plans: the folder where the plan will lie.
        device: the GPU, as "cuda:0"; empty where none is needed.
        workspace: the most bytes of device memory that a tactic may take; None for all that are free.
        made: for the plan's record.
    """

    key: PlanKey
    bundle: Bundle
    plans: Path
    device: str = ""
    workspace: int | None = None
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def graph(self) -> GraphSpec:
        """The graph that the plan is built from."""
        return self.bundle.spec.graph(self.key.network, self.key.precision)

    @property
    def label(self) -> str:
        """The network's name, for people: an add-on's beside those of its model."""
        spec = self.bundle.spec
        return f"{self.key.network} of {spec.id}" if spec.kind in ADD_ONS else self.key.network


class Cancelled(Exception):  # noqa: N818
    """The build was asked to stop, and did."""


def build(order: Order, folder: Path, report: Report, cancelled: Callable[[], bool]) -> PlanRecord:
    """Build a plan and put it in its place, whole or not at all.

    Args:
        folder: an empty one, for files that are thrown away afterwards.
        report: called with TensorRT's current phase and the share done, from threads of TensorRT's.
        cancelled: called at every step; returns whether to stop.

    Raises:
        PlanError: the graph is damaged, TensorRT cannot build it, or there is no room for it.
        DeviceMemoryError: TensorRT ran out of memory.
        BackendError, MissingDependencyError: TensorRT is not installed or finds no GPU.
        Cancelled: `cancelled` returned true.
    """
    start = time.monotonic()
    library, bundle, graph = open_library(order.key.library), order.bundle, order.graph
    opset = building.opset(library)
    model = load_graph(bundle, graph, order.key.profiles, opset)
    weights = weights_of(model, graph)
    onnx, path = serialized(model, bundle.path(graph.path), folder)
    refit = weights if {STRIPPED, REFITTABLE} & set(order.key.options) else {}
    with _on(order.device) as on_device:
        builder = on_device(lambda: _Builder(library, order))
        plan = on_device(lambda: builder.build(onnx, path, graph, list(refit), report, cancelled))
    if cancelled():
        raise Cancelled
    seconds = round(time.monotonic() - start, 1)
    made = {**order.made, **builder.logger.facts, "seconds": seconds, "host": peak_here(), "opset": opset}
    data = memoryview(plan)
    record = PlanRecord(order.key, hashlib.sha256(data).hexdigest(), data.nbytes, refit, made)
    PlanStore(bundle, order.plans).put(record, data)  # a view: no second copy of gigabytes
    return record


@contextmanager
def _on(device: str) -> Iterator[Callable[[Callable[[], T]], T]]:
    """Yield a function that calls TensorRT with the GPU's context current, where a GPU is needed."""
    if not device:
        yield lambda work: work()
        return
    from latentrt.cuda.gpu import Gpu

    gpu = Gpu(device)

    def on_device(work: Callable[[], T]) -> T:
        results: list[T] = []
        gpu.call(lambda: results.append(work()))
        return results[0]

    yield on_device


class _Builder:
    """Holds TensorRT's objects, each as long as the others need it."""

    def __init__(self, library: Library, order: Order) -> None:
        self._library, self._order = library, order
        self.logger = _listening(library)
        self._builder = library.builder(self.logger)
        self._network = building.new_network(library, self._builder)

    def build(
        self, onnx: bytes, path: Path, graph: GraphSpec, refit: list[str], report: Report, cancelled: Callable[[], bool]
    ) -> Any:
        """Return the plan's bytes, in TensorRT's memory."""
        library, key = self._library, self._order.key
        parser = _parse(library, self._network, self.logger, onnx, path)
        building.mark_refittable(self._network, refit)
        building.let_attention_decompose(library, self._network)
        config = self._builder.create_builder_config()
        building.configure(library, config, key.options)
        building.set_level(config, key)
        building.aim(library, config, key.compute_capability)
        building.limit(library, config, self._order.workspace)
        for profile in key.profiles:
            ranges = self._builder.create_optimization_profile()
            for tensor in graph.inputs:
                ranges.set_shape(tensor.name, *profile.shapes(tensor))
            config.add_optimization_profile(ranges)
        monitor = watch(library, config, report, cancelled)
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


def _parse(library: Library, network: Any, logger: Any, onnx: bytes, path: Path) -> Any:
    """Read a graph into a network; return the parser, which must live as long as the network.

    Raises:
        PlanError: it cannot be read; the message has the parser's own words.
    """
    parser = building.new_parser(library, network, logger)
    if not parser.parse(onnx, str(path)):
        errors = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise PlanError(
            f"{library.name} {library.version} cannot read {path.name} ({errors or logger.take_errors()})",
            needed=f"a graph of operators that it knows, in opset {building.opset(library)}",
            fix="latentrt build BUNDLE --check lists them; or another version of the library",
        )
    return parser


def _listening(library: Library) -> Any:
    """Return the library's logger, extended to keep TensorRT's messages about a plan's memory as well."""

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
