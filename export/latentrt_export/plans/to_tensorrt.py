"""`latentrt build`: build TensorRT plans of a bundle's graphs for one device, one network after another.

A plan is in its place as soon as it is built, so a build that was stopped or killed continues where it ended.

Polygraphy would do part of this. It is not used here: it chooses between TensorRT and TensorRT-RTX once for a process,
finds weights only beside a graph that is a file, where ours is changed in memory, and always makes a timing cache, for
which RTX wants a GPU. A test compares `--check` with it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import onnx_ir as ir

from latentrt.bundle.bundle import Bundle
from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError, PlanError, UntrustedFileError
from latentrt.runtime.tensorrt.library import Library, open_library, wanted_key
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import REFITTABLE, STRIPPED, PlanKey, PlanRecord
from latentrt.storage import check_trusted, remove_parts
from latentrt_export.plans import building
from latentrt_export.plans.build_process import Progress, build_in_child
from latentrt_export.plans.plan_builder import Order
from latentrt_export.plans.plan_graph import load_graph, weights_of
from latentrt_export.plans.plan_memory import Estimate, check_room, estimate
from latentrt_export.plans.plan_shapes import Shapes, profiles_of


@dataclass(frozen=True, slots=True)
class Built:
    """A plan that is in its place; `seconds` is its build time now, 0 if it existed before."""

    record: PlanRecord
    path: Path
    seconds: float


@dataclass(slots=True)
class Absent:
    """GPUs of a compute capability, for which TensorRT-RTX builds without one; any of them, with any driver."""

    compute_capability: tuple[int, int]
    name: str = ""
    driver: str = ""

    def close(self) -> None:
        """Do nothing; see `Gpu.close`."""


def open_target(name: str, device: str, compute_capability: str | None) -> tuple[Library, Gpu | Absent]:
    """Open the library, and the GPU that plans are built for.

    Args:
        name: "tensorrt" or "tensorrt-rtx".
        device: "cuda" or "cuda:1".
        compute_capability: as "8.9", of GPUs that need not be in this machine (only TensorRT-RTX); None for `device`.

    Raises:
        MissingDependencyError: the library, or cuda-bindings, is not installed.
        BackendError: there is no GPU, or the library cannot build for the one wanted.
    """
    library = open_library(name)
    if not library.builds:
        raise BackendError(f"{name} only runs plans", needed="--library tensorrt or tensorrt-rtx")
    if compute_capability is not None:
        return library, _absent(library, compute_capability)
    from latentrt.cuda.gpu import Gpu

    try:
        return library, Gpu(device)
    except BackendError as error:
        fix = "without a GPU: --library tensorrt-rtx --compute-capability 8.9"
        raise BackendError(error.found, needed=error.needed, fix=f"{error.fix}; or {fix}") from error


def _absent(library: Library, compute_capability: str) -> Absent:
    if not library.rtx:
        raise BackendError(
            f"{library.name} was asked to build for compute capability {compute_capability}",
            needed="the GPU itself, on which it measures",
            fix="build there; or: --library tensorrt-rtx",
        )
    known = library.compute_capabilities
    if compute_capability not in known:
        raise BackendError(
            f"{library.name} {library.version} was asked for compute capability {compute_capability}",
            needed=f"one of {', '.join(known)}",
            fix="pass another --compute-capability, or use tensorrt on that GPU",
        )
    major, _, minor = compute_capability.partition(".")
    return Absent((int(major), int(minor)))


def orders_of(
    bundle: Bundle,
    library: Library,
    gpu: Gpu | Absent,
    shapes: Sequence[Shapes],
    *,
    precision: str = "fp16",
    networks: Sequence[str] = (),
    options: Sequence[str] = (),
    workspace: int | None = None,
    plans: Path | None = None,
) -> list[Order]:
    """Return the plans to build, in the order in which a picture needs the networks.

    Args:
        bundle: the bundle; its graphs are those that its spec has.
        library: the library that builds.
        gpu: the GPU that the plans are for.
        shapes: one optimization profile each.
        precision: "fp16" or "fp32".
        networks: names; none means all of the bundle's.
        options: of `PlanKey`.
        workspace: bytes.
        plans: the folder for them; None is the bundle's place in the user's cache.

    Raises:
        BundleError: the bundle has no such network, or none in that precision.
        BackendError: the library cannot build such plans without a GPU.
        PlanError: it cannot build such plans at all, or the folder lies in a bundle.
    """
    if isinstance(gpu, Absent) and {STRIPPED, REFITTABLE} & set(options):
        raise BackendError(
            f"{library.name} was asked for a plan that is {' and '.join(options)}, without a GPU",
            needed="a GPU: weights that are set later are laid out there",
            fix="build on the device, or leave --strip and --refittable out",
        )
    building.option_flags(library, options)  # refuses what this version cannot do
    folder = PlanStore(bundle, plans).folder
    orders = []
    for name in dict.fromkeys(networks or bundle.spec.networks):
        key = wanted_key(bundle, name, precision, library, gpu)
        key = replace(key, options=tuple(sorted(options)), profiles=profiles_of(bundle.spec, name, shapes))
        if library.rtx:  # it compiles kernels where the plan runs
            key = replace(key, gpu="", driver="")
        device = "" if isinstance(gpu, Absent) else f"cuda:{gpu.ordinal}"
        orders.append(Order(key, bundle, folder, device, workspace))
    return orders


def estimates_of(library: Library, orders: Sequence[Order]) -> list[Estimate]:
    """Return an estimate of each plan, from its graph.

    Raises:
        PlanError: a graph is damaged.
        UntrustedFileError: another user may have written to the folder of plans.
    """
    found, opset = [], building.opset(library)
    for order in orders:
        model = load_graph(order.bundle, order.graph, order.key.profiles, opset)
        weights = weights_of(model, order.graph).values()
        found.append(estimate(order.key, ir.to_proto(model), weights, _seconds_before(order)))
    return found


def _seconds_before(order: Order) -> float | None:
    """Return the build time of this network's last plan with this library; None if there is none."""
    records, _ = PlanStore(order.bundle, order.plans).survey(order.key.network)
    times = [record.made.get("seconds") for record in records if record.key.library == order.key.library]
    return times[-1] if times else None


def free_memory(gpu: Gpu | Absent) -> int | None:
    """Return the bytes of the GPU's memory that are free; None where it is not in this machine."""
    return None if isinstance(gpu, Absent) else gpu.memory()[0]


def build_plans(
    orders: Sequence[Order],
    estimates: Sequence[Estimate],
    *,
    free: int | None = None,
    progress: Progress = lambda network, phase, share, left: None,
    rebuild: bool = False,
    ignore_estimate: bool = False,
) -> list[Built]:
    """Build the plans that do not exist yet. If it is stopped, the plans that were built stay.

    Args:
        orders: of any bundles and folders.
        estimates: of the orders; measurements are recorded beside them.
        free: free bytes of the GPU's memory; None where it is not in this machine.
        progress: an exception that it raises ends the build.
        rebuild: build those that exist, too.
        ignore_estimate: build also where memory or disk seem too small.

    Raises:
        DeviceMemoryError: there is too little memory; nothing has been started then.
        PlanError: a plan cannot be built or written, or another build is working in a folder.
        UntrustedFileError: another user may write to a folder.
    """
    if not orders:
        return []
    with ExitStack() as locks:
        for folder in dict.fromkeys(order.plans for order in orders):
            locks.enter_context(_alone(folder))
            remove_parts(folder)
        stores = [PlanStore(order.bundle, order.plans) for order in orders]
        found = [None if rebuild else _built(store, order.key) for store, order in zip(stores, orders, strict=True)]
        if not ignore_estimate:
            waiting = [each for each, record in zip(estimates, found, strict=True) if record is None]
            check_room(waiting, orders[0].plans, free, orders[0].key.compute_capability)
        built = []
        for order, store, each, record in zip(orders, stores, estimates, found, strict=True):
            start, seconds = time.monotonic(), 0.0
            if record is None:
                record = build_in_child(replace(order, made={"estimate": asdict(each)}), each.seconds, progress)
                seconds = time.monotonic() - start
            built.append(Built(record, store.path(record), seconds))
        return built


def _built(store: PlanStore, key: PlanKey) -> PlanRecord | None:
    """Return the record of exactly this plan; None where it does not exist or would not be loaded."""
    try:
        record = store.record(key.name)
        store.read(record)
    except (PlanError, UntrustedFileError):
        return None
    return record


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only build in a folder of plans, and refuse a folder whose plans would not be loaded.

    Raises:
        PlanError: another build works there, or the folder cannot be made.
        UntrustedFileError: another user may write to it.
    """
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        check_trusted(folder)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise PlanError(
            f"{folder} cannot be made ({error})", needed="a folder for plans", fix="pass another --plans"
        ) from error
    try:
        _lock(handle, folder)
        yield
    finally:
        os.close(handle)  # and with it the lock, as when the process is killed


def _lock(handle: int, folder: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise PlanError(
            f"another build is working in {folder}",
            needed="one build at a time",
            fix="wait for it, or pass another --plans",
        ) from error
