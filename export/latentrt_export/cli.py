"""The verbs of `latentrt` that need the extra `export`: export and verify, with their output."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrt.bundle.bundle import MANIFEST, located
from latentrt.command.terminal import show, table_of
from latentrt.errors import ExportError, MissingDependencyError
from latentrt_export.checkpoint.onnx_folder import is_onnx_folder
from latentrt_export.checkpoint.single.choices import AS_THEY_ARE, Choices

if TYPE_CHECKING:
    from latentrt_export.verify.checks import Check


def run_export(
    source: str,
    target: Path,
    *,
    revision: str | None,
    variant: str | None,
    choices: Choices,
    overwrite: bool,
    as_json: bool,
    int8: bool = False,
) -> None:
    """Export with a line for each part, and a summary at the end."""
    _need("export", torch=not is_onnx_folder(source) and not _is_merge(source, revision, variant, choices))
    from rich.console import Console

    from latentrt_export.golden import golden_runs
    from latentrt_export.merge_bundle import merge_bundle
    from latentrt_export.to_bundle import export_bundle

    console = Console(stderr=True, quiet=as_json)
    with console.status("opening the checkpoint") as status:
        common: dict[str, Any] = {
            "overwrite": overwrite,
            "golden": golden_runs,
            "progress": lambda part, done, total: status.update(f"{part} ({done + 1} of {total})"),
        }
        if _is_merge(source, revision, variant, choices):
            if int8:
                fix = "leave it out: a bundle keeps its int8"
                raise ExportError("--int8 with LoRAs for a bundle", needed="a checkpoint", fix=fix)
            own = {"allow_unmatched": choices.allow_unmatched, "adapters": choices.adapters, **common}
            summary = merge_bundle(located(source), target, choices.loras, **own)
        else:
            summary = export_bundle(
                source, target, revision=revision, variant=variant, choices=choices, int8=int8, **common
            )
    if as_json:
        print(json.dumps({**asdict(summary), "target": str(target)}))
        return
    table = table_of("network", "seconds", "nodes", "graph", "weights shared", "weights written")
    for name, part in summary.networks.items():
        sizes = (part.graph_bytes, part.shared_bytes, part.sidecar_bytes)
        table.add_row(name, f"{part.seconds:.1f}", str(part.nodes), *(f"{size / 1e6:.2f} MB" for size in sizes))
    show(table)
    for note in summary.notes:
        print(note)
    print(f"{target}: {summary.total_bytes / 1e6:.1f} MB")


def _is_merge(source: str, revision: str | None, variant: str | None, choices: Choices) -> bool:
    """Return whether what LoRAs need, and nothing else, is asked for with a bundle: it is then not exported again."""
    alone = replace(choices, lora=(), allow_unmatched=False, adapters=False) == AS_THEY_ARE
    asked = bool(choices.loras) or choices.adapters
    return asked and alone and not revision and not variant and (located(source) / MANIFEST).is_file()


def run_verify(
    bundle: Path, against: str | Path | None, *, base: Path | None = None, steps: int, choices: Choices, as_json: bool
) -> int:
    """Show every check of a bundle; return 1 if any is beyond its bound, else 0.

    Args:
        bundle: a model's; with `base`, a ControlNet's or T2I-Adapter's, or a LoRA with its strengths.
        against: the checkpoint, any kind of source; None: the bundle itself.
        base: the model that an add-on is used with.
        steps, choices: as of `verify`.
        as_json: print one JSON object.
    """
    _need("verify")
    from rich.console import Console

    console = Console(stderr=True, quiet=as_json)
    checks: list[Check] = []
    with console.status("measuring") as status:
        for check in _measured(bundle, against, base, steps, choices):
            checks.append(check)
            status.update(f"measured {check.depth}: {check.what}")
    failed = sum(check.passed is False for check in checks)
    if as_json:
        print(json.dumps({"passed": not failed, "checks": [check.to_dict() for check in checks]}))
        return int(failed > 0)
    table = table_of("depth", "what", "measured", "value", "bound", "")
    for check in checks:
        if check.value is None:
            table.add_row(check.depth, check.what, check.measure, "", "", "[yellow]not measured[/]")
        else:
            bound = f"{'>=' if check.at_least else '<='} {check.bound:.3g}"
            mark = "[green]ok[/]" if check.passed else "[red]beyond[/]"
            table.add_row(check.depth, check.what, check.measure, f"{check.value:.3g}", bound, mark)
    show(table)
    for note in dict.fromkeys(check.note for check in checks if check.note):
        print(f"{', '.join(check.what for check in checks if check.note == note)}: {note}")
    measured = sum(check.value is not None for check in checks)
    unserved = f", {len(checks) - measured} not measured" if measured < len(checks) else ""
    print(f"{measured - failed} of {measured} within their bounds{unserved}")
    return int(failed > 0)


def _measured(
    bundle: Path, against: str | Path | None, base: Path | None, steps: int, choices: Choices
) -> Iterator[Check]:
    from latentrt_export.verify.add_ons import verify_add_on
    from latentrt_export.verify.verify import verify

    if base is None:
        return verify(bundle, against or str(bundle), steps=steps, choices=choices)
    if choices.options:
        found = f"{' '.join(choices.options)} with --base"
        raise ExportError(found, needed="none of them", fix="give a LoRA in the place of BUNDLE: FILE:STRENGTH")
    return verify_add_on(str(bundle), base, against=against, steps=steps)


def _need(verb: str, *, torch: bool = True) -> None:
    """Refuse where a library is missing; graphs that exist already need no torch."""
    try:
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401

        if torch:
            import diffusers  # noqa: F401
            import torch as _  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"`latentrt {verb}` cannot import {error.name or error}",
            needed="the extra `export`",
            fix="pip install 'latentrt[export]'",
        ) from error
