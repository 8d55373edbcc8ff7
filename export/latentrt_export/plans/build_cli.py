"""The verb `latentrt build`: estimates, progress and plans on the terminal, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.bundle.bundle import Bundle
from latentrt.command.terminal import show, table_of
from latentrt.errors import MissingDependencyError
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import LEVEL, REFITTABLE, STRIPPED, VERSION_COMPATIBLE, PlanRecord

if TYPE_CHECKING:
    from latentrt.cuda.gpu import Gpu
    from latentrt.runtime.tensorrt.library import Library
    from latentrt_export.plans.build_process import Progress
    from latentrt_export.plans.plan_builder import Order
    from latentrt_export.plans.plan_memory import Estimate
    from latentrt_export.plans.plan_shapes import Shapes
    from latentrt_export.plans.to_tensorrt import Absent, Built

Wanted = Sequence[tuple[Bundle, tuple[str, ...]]]  # bundles, and those of their networks that are built


def run_build(
    bundle: Path,
    *,
    lanes: str | None,
    pictures: str | None,
    size: str | None,
    tokens: str | None,
    lora_rank: str | None,
    profiles: Sequence[str],
    controlnets: Sequence[str],
    library: str,
    device: str,
    compute_capability: str | None,
    plans: Path | None,
    check: bool,
    list_plans: bool,
    remove: Sequence[str],
    as_json: bool,
    **how: Any,
) -> int:
    """Build, estimate, check, list or remove plans; return the exit code. See `latentrt build --help`."""
    if list_plans or remove:
        return _list(PlanStore(Bundle.open(bundle), plans), remove, as_json)
    _need_onnx()
    from latentrt_export.plans.plan_shapes import shapes_of
    from latentrt_export.plans.to_tensorrt import open_target
    from latentrt_export.plans.wanted import bundles_of, networks_of

    bundles = bundles_of(bundle, controlnets, loras=lora_rank is not None)
    asked = {"lanes": lanes, "pictures": pictures, "size": size, "tokens": tokens, "rank": lora_rank}
    shapes = shapes_of(bundles[0].spec, {name: text for name, text in asked.items() if text is not None}, profiles)
    wanted = networks_of(bundles, how.pop("networks"))
    if check:
        return _check(wanted, library, how["precision"], shapes, as_json)
    opened_library, gpu = open_target(library, device, compute_capability)
    try:
        return _build(wanted, opened_library, gpu, shapes, plans, as_json=as_json, **how)
    finally:
        gpu.close()


def _build(
    wanted: Wanted,
    library: Library,
    gpu: Gpu | Absent,
    shapes: Sequence[Shapes],
    plans: Path | None,
    *,
    precision: str,
    workspace: float | None,
    strip: bool,
    refittable: bool,
    version_compatible: bool,
    optimization_level: int | None,
    rebuild: bool,
    ignore_estimate: bool,
    dry_run: bool,
    as_json: bool,
) -> int:
    from latentrt_export.plans.to_tensorrt import build_plans, estimates_of, free_memory, orders_of

    flags = {STRIPPED: strip, REFITTABLE: refittable, VERSION_COMPATIBLE: version_compatible}
    levels = [] if optimization_level is None else [f"{LEVEL}{optimization_level}"]
    common: dict[str, Any] = {
        "precision": precision,
        "options": [name for name, asked in flags.items() if asked] + levels,
        "workspace": None if workspace is None else int(workspace * 2**30),
        "plans": plans,
    }
    orders = [order for one, own in wanted for order in orders_of(one, library, gpu, shapes, networks=own, **common)]
    estimates = estimates_of(library, orders)
    free = free_memory(gpu)
    if not as_json:
        _show_estimates(estimates, orders, free)
    gpu.close()  # its memory is for the process that builds
    built: list[Built] = []
    if not dry_run:
        with _bars(quiet=as_json) as progress:
            how = {"rebuild": rebuild, "ignore_estimate": ignore_estimate}
            built = build_plans(orders, estimates, free=free, progress=progress, **how)
    if as_json:
        facts = {
            "library": library.name,
            "version": library.version,
            "gpu": gpu.name,
            "compute_capability": "{}.{}".format(*gpu.compute_capability),
            "free": free,
        }
        plans_made = [{"seconds": each.seconds, "path": str(each.path), **_facts(each.record)} for each in built]
        print(json.dumps({**facts, "estimates": [asdict(each) for each in estimates], "plans": plans_made}))
    elif built:
        _show_built(built, orders)
    return 0


def _show_estimates(estimates: Sequence[Estimate], orders: Sequence[Order], free: int | None) -> None:
    table = table_of("network", "shapes", "weights", "activations", "plan", "GPU", "host", "last build")
    for each, order in zip(estimates, orders, strict=True):
        sizes = (each.weights, each.activations, each.plan, each.device, each.host)
        last = "" if each.seconds is None else f"{each.seconds:.0f} s"
        table.add_row(order.label, "; ".join(map(str, order.key.profiles)), *map(_megabytes, sizes), last)
    show(table)
    here = "" if free is None else f" The GPU has {_megabytes(free)} free."
    print(f"Estimates; GPU and host are what building one network takes.{here}")


def _show_built(built: Sequence[Built], orders: Sequence[Order]) -> None:
    table = table_of("network", "plan", "size", "seconds")
    table.columns[1].overflow = "fold"  # as in the list
    for each, order in zip(built, orders, strict=True):
        seconds = f"{each.seconds:.1f}" if each.seconds else "built before"
        table.add_row(order.label, each.record.name, _megabytes(each.record.bytes), seconds)
    show(table)
    for folder in dict.fromkeys(each.path.parent for each in built):
        print(folder)


@contextmanager
def _bars(*, quiet: bool) -> Iterator[Progress]:
    """Show a bar for each network, on standard error, with TensorRT's current phase and the time left."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[doing]}"))
    with Progress(*columns, console=Console(stderr=True, quiet=quiet)) as bars:
        tasks: dict[str, Any] = {}

        def progress(network: str, phase: str, share: float, left: float | None) -> None:
            if network not in tasks:
                for task in tasks.values():
                    bars.update(task, completed=1.0, doing="")
                tasks[network] = bars.add_task(network, total=1.0, doing="")
            ahead = "" if left is None else f", about {left:.0f} s left"
            bars.update(tasks[network], completed=share, doing=f"{phase}{ahead}")

        yield progress
        for task in tasks.values():
            bars.update(task, completed=1.0, doing="")


def _check(wanted: Wanted, name: str, precision: str, shapes: Sequence[Shapes], as_json: bool) -> int:
    """Show what the parser refuses; return 1 if it refuses anything, else 0."""
    from rich.markup import escape

    from latentrt.runtime.tensorrt.library import open_library
    from latentrt_export.plans.capability import capability
    from latentrt_export.plans.plan_shapes import profiles_of

    library = open_library(name)
    found = [
        capability(one, library, network, precision, profiles_of(one.spec, network, shapes))
        for one, own in wanted
        for network in own
    ]
    if as_json:
        print(json.dumps({"library": name, "version": library.version, "networks": [each.to_dict() for each in found]}))
    else:
        table = table_of("network", "nodes", "opset", "refused")
        for each in found:
            table.add_row(each.network, str(each.nodes), str(each.opset), str(len(each.refused)))
            for node in each.refused:
                table.add_row("", "", "", escape(f"{node.operator} {node.node}: {node.why}"))
        show(table)
    return int(any(each.refused for each in found))


def _list(store: PlanStore, remove: Sequence[str], as_json: bool) -> int:
    """List the plans in the folder, after some were removed; return 0."""
    for name in remove:
        store.remove(name)
    records, refused = store.survey()
    if as_json:
        others = [{"name": name, "found": error.found} for name, error in refused.items()]
        plans = [_facts(record) for record in records]
        print(json.dumps({"folder": str(store.folder), "plans": plans, "refused": others}))
        return 0
    from rich.markup import escape

    table = table_of("plan", "size", "graph", "built for", "shapes")
    table.columns[0].overflow = table.columns[3].overflow = "fold"  # --remove needs the whole name
    for record in records:
        key = record.key
        device = " ".join(
            filter(None, (key.gpu, f"SM {key.compute_capability}", key.library, key.version, *key.options))
        )
        shapes = "; or ".join(map(str, key.profiles))
        table.add_row(record.name, _megabytes(record.bytes), store.named(key.graph), device, shapes)
    for name, error in refused.items():
        table.add_row(name, "", "", escape(f"not loaded: {error.found}"), "")
    show(table)
    print(store.folder)
    return 0


def _facts(record: PlanRecord) -> dict[str, Any]:
    return {"name": record.name, "bytes": record.bytes, "key": asdict(record.key), "made": dict(record.made)}


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.0f} MB"


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"`latentrt build` cannot import {error.name}",
            needed="the extra `build`",
            fix="pip install 'latentrt[build]'",
        ) from error
