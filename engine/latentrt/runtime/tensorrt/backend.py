"""TensorRT and TensorRT-RTX: plans, bound to device memory and queued on the device's one stream.

Nothing is built here, and nothing else is tried where no plan fits: an error says what was found and needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError, LatentrtError, NetworkError, PlanError
from latentrt.runtime.base import Facts
from latentrt.runtime.signature import Arrays, check_arrays, check_feeds, shape_of
from latentrt.runtime.tensorrt.library import Library, wanted_key
from latentrt.runtime.tensorrt.loaded import Host, LoadedPlan, TensorRtBound
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import REFITTABLE, PlanKey, PlanRecord, Profile
from latentrt.runtime.tensorrt.refit import as_wanted, replaced_in, replaced_places

ALIGNMENT = 256  # bytes, of every address that TensorRT is given
SHAPES_KEPT = 4  # the number of shapes that a network keeps memory for when it is called with host arrays


class TensorRtBackend:
    """Runs a bundle's plans.

    Args:
        gpu: the opened device.
        library: the flavour of TensorRT.
        precision: "fp16" or "fp32".
        plans: the folder of plans; None is the bundle's place in the user's cache.

    Raises:
        BackendError: TensorRT finds no driver or device.
    """

    facts = Facts(fixed_lanes=True, one_stream=True, exact=False, captures=True, replaces=True, adapts=True)

    def __init__(self, gpu: Gpu, library: Library, *, precision: str = "fp16", plans: Path | None = None) -> None:
        self.name, self.device = library.name, "cuda"
        self.gpu, self.library, self.precision, self.plans = gpu, library, precision, plans
        self.variants: tuple[str, ...] = (precision,)
        self._host = Host(gpu, library)

    def load(self, bundle: Bundle, network: str) -> TensorRtNetwork:
        """Find a network's plans. A single one is loaded now; of several, each at the first use of its shapes. Where
        its graph reads weights that the bundle has in memory, they get these, and only plans are found that take them.

        Raises:
            BundleError: the bundle has no such network in this precision.
            PlanError: no plan is for this device and version, or takes the weights in memory; or it is damaged, or
                TensorRT rejects it.
            UntrustedFileError: another user may have written to a plan or its folder; it is then not deserialized.
            DeviceMemoryError: the device has too little memory.
        """
        graph = bundle.spec.graph(network, *self.variants)
        wanted = wanted_key(bundle, network, self.precision, self.library, self.gpu)
        store, places = PlanStore(bundle.base, self.plans, graph), replaced_places(bundle, graph)
        fitting = store.fitting(wanted)
        if places:
            fitting = [one for one in fitting if REFITTABLE in one.key.options] or [_refittable(fitting[0], store)]
        loaded = TensorRtNetwork(self._host, store, graph, wanted, fitting)
        if places:
            try:
                loaded.refit(replaced_in(bundle, places, fitting[0].refit))
            except BaseException:
                loaded.close()
                raise
        return loaded


class TensorRtNetwork:
    """A network of a bundle through its plans.

    `bind` binds it to arrays on the device; calling it copies host arrays there and back. `graph` is the signature of
    its plans.
    """

    def __init__(
        self, host: Host, store: PlanStore, graph: GraphSpec, wanted: PlanKey, fitting: Sequence[PlanRecord]
    ) -> None:
        self.graph, self.gpu = graph, host.gpu
        self._host, self._store, self._wanted = host, store, wanted
        self._loaded: dict[str, LoadedPlan] = {}
        self._bounds: dict[int, TensorRtBound] = {}
        self._calls: dict[tuple[tuple[str, int], ...], _HostCall] = {}
        self._replaced: dict[str, NDArray[Any]] = {}
        self._closed = False
        self._fitting = fitting
        if len(self._fitting) == 1:
            self._load(self._fitting[0])

    @property
    def best_lanes(self) -> int:
        """The batch that its first plan was built for."""
        side = self.graph.inputs[0].shape[0]
        return side if isinstance(side, int) else self._fitting[0].key.profiles[0].ranges[side][1]

    @property
    def profiles(self) -> tuple[Profile, ...]:
        """The shapes that its plans serve."""
        return tuple(profile for record in self._fitting for profile in record.key.profiles)

    def bind(self, arrays: Mapping[str, DeviceArray]) -> TensorRtBound:
        """See `DeviceNetwork.bind`. A first call is made with zeros, since TensorRT allocates in it. After that the
        inputs are as they were, and the outputs are lost.

        Raises:
            NetworkError: names, dtypes, shapes or alignment do not fit, or TensorRT fails.
            PlanError: no plan serves these shapes; those that are served are named.
            UntrustedFileError, DeviceMemoryError: see `TensorRtBackend.load`.
        """
        if self._closed:
            raise BackendError("the network was closed", needed="an open one", fix="load the engine again")
        sizes = check_arrays(self.graph, arrays)
        _check_alignment(self.graph, arrays)
        plan = self._plan(sizes)
        bound = TensorRtBound(self._host, plan, self.graph, arrays, plan.record.profile(sizes))
        bound.on_close = lambda: self._bounds.pop(id(bound), None)
        self._bounds[id(bound)] = bound
        return bound

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once on host arrays; memory is kept for the shapes used last.

        Raises:
            NetworkError: the feeds do not fit the signature, or TensorRT fails.
            PlanError, UntrustedFileError, DeviceMemoryError: see `bind`.
        """
        sizes = check_feeds(self.graph, feeds)
        call = self._calls.pop(tuple(sizes.items()), None) or _HostCall(self, self.graph, sizes)
        self._calls[tuple(sizes.items())] = call
        if len(self._calls) > SHAPES_KEPT:
            self._calls.pop(next(iter(self._calls))).close()
        return call(feeds)

    def refit(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Use these weights, and the bundle's for all others; with no weights, the bundle's are restored.

        Every weight of a plan is sent: where only changed ones were, traces of the previous ones were seen
        (https://github.com/NVIDIA/TensorRT/issues/3628). What is bound stays bound. A CUDA graph must be captured
        again: nothing promises that it sees new weights.

        Raises:
            PlanError: a plan was not built to be refitted, it has no such name or size, or TensorRT refuses. After
                TensorRT's refusal the network is closed, since some weights may be new.
        """
        for record in self._fitting:
            _check_names(_refittable(record, self._store), weights, self._store)
        table = self._fitting[0].refit
        self._replaced = {name: as_wanted(name, values, table[name]) for name, values in weights.items()}
        try:
            for plan in self._loaded.values():
                plan.refit(plan.record.refit, self._values(plan))
        except LatentrtError:
            self.close()
            raise

    def close(self) -> None:
        """Close what is bound, and free all memory."""
        self._closed = True
        for call in self._calls.values():
            call.close()
        for bound in list(self._bounds.values()):
            bound.close()
        self._calls.clear()
        self._loaded.clear()

    def _plan(self, sizes: Mapping[str, int]) -> LoadedPlan:
        """Return the plan that serves these sizes best, independent of earlier calls."""
        record = self._store.choose(self._fitting, sizes)
        return self._loaded.get(record.name) or self._load(record)

    def _load(self, record: PlanRecord) -> LoadedPlan:
        record = self._store.record(record.name)  # it may have been built again since it was found
        stale = record.key.weights != self._wanted.weights
        plan = LoadedPlan(self._host, self._store, record, self.graph, stale=stale)
        if self._replaced:
            plan.refit(record.refit, self._values(plan))
        self._loaded[record.name] = plan
        return plan

    def _values(self, plan: LoadedPlan) -> Callable[[str], NDArray[Any]]:
        return lambda name: self._replaced[name] if name in self._replaced else plan.stored(name)


class _HostCall:
    """Device arrays for one set of sizes, with a network bound to them."""

    def __init__(self, network: TensorRtNetwork, graph: GraphSpec, sizes: Mapping[str, int]) -> None:
        self._gpu, self._graph = network.gpu, graph
        self._arrays: dict[str, DeviceArray] = {}
        try:
            for tensor in (*graph.inputs, *graph.outputs):
                self._arrays[tensor.name] = self._gpu.empty(shape_of(tensor, sizes), tensor.dtype)
            self._bound = network.bind(self._arrays)
        except BaseException:
            self._free()
            raise

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        for tensor in self._graph.inputs:
            array = self._arrays[tensor.name]
            self._gpu.upload(feeds[tensor.name], array)
        self._bound.enqueue()
        return {tensor.name: self._gpu.download(self._arrays[tensor.name]) for tensor in self._graph.outputs}

    def close(self) -> None:
        self._bound.close()
        self._free()

    def _free(self) -> None:
        while self._arrays:
            self._gpu.free(self._arrays.popitem()[1])


def _check_alignment(graph: GraphSpec, arrays: Mapping[str, DeviceArray]) -> None:
    for name, array in arrays.items():
        if array.pointer % ALIGNMENT:
            raise NetworkError(
                f"{graph.path} was given {name} at address {array.pointer:#x}",
                needed=f"an address that is a multiple of {ALIGNMENT}",
            )


def _refittable(record: PlanRecord, store: PlanStore) -> PlanRecord:
    """Return a plan that takes other weights. Raise PlanError where it does not."""
    if REFITTABLE not in record.key.options:
        found = f"the plan {record.name} takes no weights but its own"
        raise PlanError(found, needed="a refittable plan", fix=f"{store.command} --refittable")
    return record


def _check_names(record: PlanRecord, weights: Iterable[str], store: PlanStore) -> None:
    if unknown := sorted(set(weights) - set(record.refit)):
        found = f"{record.key.network} has no weight {', '.join(unknown)}"
        raise PlanError(found, needed="the names of its graph", fix=f"{store.command} --refittable")
