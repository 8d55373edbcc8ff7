"""A deserialized TensorRT plan, its execution contexts, and the memory that these share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import GraphSpec, TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.errors import DeviceMemoryError, LatentrtError, NetworkError, PlanError
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import STRIPPED, PlanRecord
from latentrt.runtime.tensorrt.refit import StoredWeights, refit

T = TypeVar("T")


class Host:
    """The objects that all plans of a backend share: device, library, its runtime and logger, and working memory.

    Raises:
        BackendError: TensorRT finds no driver or device.
    """

    def __init__(self, gpu: Gpu, library: Library) -> None:
        self.gpu, self.library = gpu, library
        self.logger = library.logger()
        self.runtime = self.on_device(lambda: library.runtime(self.logger))
        self.scratch = Scratch(gpu)

    def on_device(self, work: Callable[[], T]) -> T:
        """Call TensorRT with the device's context current, and forget the errors that it logged before."""
        self.logger.take_errors()
        results: list[T] = []
        self.gpu.call(lambda: results.append(work()))
        return results[0]

    def failure(self, found: str, needed: str, fix: str, kind: type[LatentrtError] = PlanError) -> LatentrtError:
        """Return an error with TensorRT's own words: a DeviceMemoryError where these are about memory."""
        words = self.logger.take_errors() or "TensorRT says nothing more"
        if re.search(r"out ?of ?memory", words, re.IGNORECASE):
            free, total = self.gpu.memory()
            return DeviceMemoryError(
                f"{found} ({words}); {free / 1e6:.0f} of {total / 1e6:.0f} MB are free",
                needed="enough free memory on the GPU",
                fix="smaller shapes, or end what else runs there (nvidia-smi)",
            )
        return kind(f"{found} ({words})", needed=needed, fix=fix)


class Scratch:
    """Working memory that all contexts on one stream share, since only one of them runs at a time.

    It only grows: a captured CUDA graph holds the address of the piece that was current then, so a piece stays until
    all its users have given it back.
    """

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._users: dict[DeviceArray, int] = {}

    def take(self, size: int) -> DeviceArray:
        """Return a piece of at least that many bytes.

        Raises:
            DeviceMemoryError: there is not enough memory.
        """
        piece = next((piece for piece in self._users if piece.bytes >= size), None)
        if piece is None:
            piece = self._gpu.empty((max(size, 1),), np.uint8)
        self._users[piece] = self._users.get(piece, 0) + 1
        return piece

    def give_back(self, piece: DeviceArray) -> None:
        """Give back a piece that was taken."""
        self._users[piece] -= 1
        if not self._users[piece]:
            del self._users[piece]
            self._gpu.free(piece)


class LoadedPlan:
    """A deserialized plan with its weights.

    Args:
        host: its runtime deserializes the plan.
        store: the folder that the plan is in.
        record: the plan's record.
        graph: the signature that it must have.
        stale: whether its weights differ from the bundle's, which it then takes.

    Raises:
        UntrustedFileError: another user may have written it; TensorRT then does not get it.
        PlanError: it is damaged, TensorRT rejects it, or it has other inputs and outputs.
        DeviceMemoryError: the device has too little memory.
    """

    def __init__(self, host: Host, store: PlanStore, record: PlanRecord, graph: GraphSpec, *, stale: bool) -> None:
        self.record = record
        self._host = host
        self.stored = StoredWeights(store.bundle, record.refit)
        self.engine = self._deserialize(store)
        check_signature(host.library, self.engine, graph, len(record.key.profiles))
        if STRIPPED in record.key.options or stale:
            self.refit(record.refit, self.stored)
        self.new_context = host.library.contexts(self.engine)

    def _deserialize(self, store: PlanStore) -> Any:
        """Return the engine. TensorRT gets exactly the bytes that were checked; they are dropped with this call."""
        host, plan = self._host, store.read(self.record)
        engine = host.on_device(lambda: host.runtime.deserialize_cuda_engine(plan))
        if engine is None:
            raise host.failure(
                f"{host.library.name} {host.library.version} cannot load {store.path(self.record)}",
                f"a plan for it and for {host.gpu.name}",
                f"{store.command} --rebuild",
            )
        return engine

    def refit(self, names: Iterable[str], value: Callable[[str], NDArray[Any]]) -> None:
        """Set weights; see `latentrt.runtime.tensorrt.refit.refit`."""
        self._host.gpu.wait()  # refitting a plan in use is undefined
        host = self._host
        host.on_device(lambda: refit(host.library, host.logger, self.engine, names, value))


class TensorRtBound:
    """An execution context with its arrays; see `Bound`. A CUDA graph that captured it is of no use after `close`."""

    def __init__(
        self,
        host: Host,
        plan: LoadedPlan,
        graph: GraphSpec,
        arrays: Mapping[str, DeviceArray],
        profile: int,
    ) -> None:
        self._host, self._graph = host, graph
        self.on_close: Callable[[], object] = lambda: None
        self._piece: DeviceArray | None = None
        self._context = host.on_device(plan.new_context)
        try:
            if self._context is None:
                raise self._failure("cannot be run")
            host.on_device(lambda: self._set(plan, arrays, profile))
            self._warm_up([arrays[tensor.name] for tensor in graph.inputs])
        except BaseException:
            self.close()
            raise

    def enqueue(self) -> None:
        """See `Bound.enqueue`.

        Raises:
            NetworkError: TensorRT cannot, or it was closed.
            DeviceMemoryError: TensorRT lacks memory.
        """
        self._host.gpu.call(self._enqueue)

    def close(self) -> None:
        """Wait, and release the context; the arrays stay."""
        if self._context is not None:
            self._host.gpu.wait()
            self._context = None
        if self._piece is not None:
            self._host.scratch.give_back(self._piece)
            self._piece = None
        self.on_close()

    def _enqueue(self) -> None:
        if self._context is None or not self._context.execute_async_v3(self._host.gpu.stream):
            raise self._failure("was not run")

    def _set(self, plan: LoadedPlan, arrays: Mapping[str, DeviceArray], profile: int) -> None:
        """Set profile, shapes, working memory and addresses, in this order."""
        context = self._context
        self._need(context.set_optimization_profile_async(profile, self._host.gpu.stream), f"profile {profile}")
        self._host.gpu.wait()
        for tensor in self._graph.inputs:
            shape = arrays[tensor.name].shape
            self._need(context.set_input_shape(tensor.name, shape), f"{tensor.name} of {shape}")
        lacking = context.infer_shapes()
        self._need(not lacking, f"too little known of {', '.join(lacking)}")
        for tensor in self._graph.outputs:
            shape = tuple(context.get_tensor_shape(tensor.name))
            self._need(shape == arrays[tensor.name].shape, f"{tensor.name} of {arrays[tensor.name].shape}, not {shape}")
        self._piece = self._host.scratch.take(int(context.update_device_memory_size_for_shapes()))
        context.set_device_memory(self._piece.pointer, self._piece.bytes)
        for name, array in arrays.items():
            self._need(context.set_tensor_address(name, array.pointer), f"{name} at address {array.pointer:#x}")

    def _warm_up(self, inputs: list[DeviceArray]) -> None:
        """Make a first call at these addresses, with zeros, which are in range for token ids too."""
        gpu = self._host.gpu
        kept: list[DeviceArray] = []
        try:
            for array in inputs:
                kept.append(gpu.empty(array.shape, array.dtype))
                gpu.copy(array, kept[-1])
                gpu.fill_zero(array)
            self.enqueue()
        finally:
            for copy, array in zip(kept, inputs, strict=False):
                gpu.copy(copy, array)
                gpu.free(copy)

    def _need(self, done: object, what: str) -> None:
        if not done:
            raise self._failure(f"does not take {what}")

    def _failure(self, what: str) -> LatentrtError:
        fix = "latentrt doctor; then latentrt build BUNDLE --rebuild"
        return self._host.failure(f"{self._graph.path} {what}", "a run without errors", fix, NetworkError)


def check_signature(library: Library, engine: Any, graph: GraphSpec, profiles: int) -> None:
    """Refuse an engine whose inputs, outputs or profiles are not those of a graph's signature.

    Raises:
        PlanError: a name, mode, dtype, place, dimension or the number of profiles is off.
    """
    modes, places = library.module.TensorIOMode, library.module.TensorLocation
    found = {_io(engine, name, library) for name in map(engine.get_tensor_name, range(engine.num_io_tensors))}
    tensors = [*((t, modes.INPUT) for t in graph.inputs), *((t, modes.OUTPUT) for t in graph.outputs)]
    needed = {(t.name, mode.name, t.dtype, places.DEVICE.name) for t, mode in tensors}
    if found != needed:
        raise _misfit(graph, f"{sorted(found - needed)}", f"{sorted(needed - found)}")
    for tensor, _ in tensors:
        shape = tuple(engine.get_tensor_shape(tensor.name))
        if not _may_have(tensor, shape):
            raise _misfit(graph, f"{tensor.name} of {shape}", f"{tensor.shape}")
    if engine.num_optimization_profiles != profiles:
        raise _misfit(graph, f"{engine.num_optimization_profiles} profiles", f"{profiles} profiles, as in its record")


def _io(engine: Any, name: str, library: Library) -> tuple[str, str, str, str]:
    dtype = library.dtype(engine.get_tensor_dtype(name)).name
    return name, engine.get_tensor_mode(name).name, dtype, engine.get_tensor_location(name).name


def _may_have(tensor: TensorSpec, shape: tuple[int, ...]) -> bool:
    """Return whether a tensor may have this shape: -1 is any size, and a dimension with a name may be fixed."""
    return len(shape) == len(tensor.shape) and all(
        side == size or size == -1 or isinstance(side, str) for side, size in zip(tensor.shape, shape, strict=True)
    )


def _misfit(graph: GraphSpec, found: str, needed: str) -> PlanError:
    return PlanError(f"the plan of {graph.path} has {found}", needed=needed, fix="latentrt build BUNDLE --rebuild")
