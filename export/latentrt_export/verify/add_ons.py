"""An add-on beside a base, measured against diffusers: a ControlNet, a T2I-Adapter or a LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from latentrt.adapters.given import parsed
from latentrt.bundle.bundle import MANIFEST, Bundle, located, located_lora
from latentrt.bundle.spec import ADD_ONS, CONTROLNETS, T2I_ADAPTER
from latentrt.engine import Engine
from latentrt.errors import ExportError
from latentrt_export.checkpoint.lone_control import ADAPTER, PART
from latentrt_export.checkpoint.source import Checkpoint, checkpoint_of
from latentrt_export.verify.checks import Check
from latentrt_export.verify.controls import NAME, controlled_checks, open_theirs, residual_checks
from latentrt_export.verify.loras import lora_checks
from latentrt_export.verify.reference import Theirs, incomparable, plain_folder
from latentrt_export.verify.verify import check_whole

MEASURED = (*CONTROLNETS, T2I_ADAPTER)


def verify_add_on(
    add_on: str, base: str | Path, *, against: str | Path | None = None, steps: int = 20
) -> Iterator[Check]:
    """Measure an add-on used with a base, one check at a time.

    Args:
        add_on: the bundle of a ControlNet or T2I-Adapter; or a LoRA, FILE, FILE:0.8 or FILE:0.8:0.5.
        base: the bundle of the model; diffusers opens it too.
        against: the folder, hub id or single file that a ControlNet or T2I-Adapter must equal; None: what its bundle
            holds of it.
        steps: solver steps of each picture.

    Raises:
        BundleError: a bundle is none, or is damaged.
        ExportError: what it is compared with is none, or another; or diffusers cannot open the base.
        AdapterError: the LoRA does not fit the base.
        RequestError: the add-on does not fit the base.
    """
    model = Bundle.open(base)
    check_whole(model, model.root)
    folder = located(add_on)
    is_bundle = (folder / MANIFEST).is_file()
    if not is_bundle and against is not None:
        raise ExportError(f"--against for the LoRA {add_on}", needed="the bundle of a ControlNet or T2I-Adapter")
    with checkpoint_of(model.root) as source, plain_folder(source) as theirs:
        if is_bundle:
            yield from _controls(Bundle.open(folder), model, theirs, against, steps)
        else:
            lora = parsed(add_on)
            lora = replace(lora, path=located_lora(lora.path))
            yield from lora_checks(lora, model, theirs, steps)


def _controls(
    add_on: Bundle, base: Bundle, checkpoint: Path, against: str | Path | None, steps: int
) -> Iterator[Check]:
    spec = add_on.spec
    if spec.kind not in MEASURED:
        fix = "" if spec.kind in ADD_ONS else "leave out --base"
        needed = f"the bundle of a {', '.join(ADD_ONS[kind] for kind in MEASURED)}, or a LoRA"
        raise ExportError(f"{spec.id}, with --base, is of the kind {spec.kind}", needed=needed, fix=fix)
    part = PART if spec.kind in CONTROLNETS else ADAPTER
    with (
        checkpoint_of(add_on.root / part if against is None else against) as source,
        plain_folder(_checked(source, part, add_on)) as folder,
        Engine.load(base.root, check_hashes=False, cache=False, control={NAME: add_on.root}) as engine,
    ):
        theirs = open_theirs(spec, folder)
        yield from residual_checks(engine, add_on, theirs)
        yield from controlled_checks(engine, spec, Theirs(checkpoint, engine), theirs, steps)


def _checked(source: Checkpoint, part: str, add_on: Bundle) -> Checkpoint:
    if part not in source.configs:
        raise incomparable(f"{source.id} has {', '.join(source.configs)}, and {add_on.root} is of a {part}")
    return source
