"""Parity with diffusers, measured at three depths (network, step, image), and of a batch with its own jobs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import ADD_ONS, CONDITIONER, SHALLOW
from latentrt.engine import Engine
from latentrt.errors import ExportError
from latentrt.golden import TOLERANCE, worst_error
from latentrt_export.checkpoint.single.choices import AS_THEY_ARE, Choices
from latentrt_export.checkpoint.source import Checkpoint, checkpoint_of
from latentrt_export.to_bundle import networks_of
from latentrt_export.verify.checks import Check
from latentrt_export.verify.images import batch_check, image_checks
from latentrt_export.verify.networks import network_checks
from latentrt_export.verify.reference import Theirs, incomparable, plain_folder
from latentrt_export.verify.steps import step_checks


def verify(
    bundle: str | Path,
    checkpoint: str | Path,
    *,
    steps: int = 20,
    revision: str | None = None,
    variant: str | None = None,
    choices: Choices = AS_THEY_ARE,
) -> Iterator[Check]:
    """Measure a bundle against a diffusers checkpoint, one check at a time.

    Args:
        bundle: the bundle to measure; its hashes are checked.
        checkpoint: the diffusers folder, hub id, single file or preset:NAME that it must equal (a bundle is such a
            folder too).
        steps: solver steps of the step depth and of the image depth.
        revision, variant: of the checkpoint, as in `open_checkpoint`.
        choices: what the user decided about the checkpoint when it was exported.

    Raises:
        BundleError: the bundle is none, or is damaged.
        ExportError: the checkpoint is none, or one that the bundle cannot be compared with; such as the bundle itself
            where LoRAs were merged into it.
        UnsafeWeightsError: the checkpoint has pickled weights only.
    """
    opened = Bundle.open(bundle)
    if opened.spec.kind in ADD_ONS:
        raise ExportError(
            f"{opened.root} is a {ADD_ONS[opened.spec.kind]}",
            needed="the model that it is used with, too",
            fix=f"latentrt verify {opened.root} --base BUNDLE",
        )
    check_whole(opened, checkpoint)
    with checkpoint_of(checkpoint, revision, variant, choices) as source:
        yield from _verify(opened, source, steps)


def check_whole(opened: Bundle, checkpoint: str | Path) -> None:
    """Refuse a bundle whose LoRAs diffusers would not see, where it is the checkpoint too. Raise ExportError."""
    if "base" in opened.spec.made and Path(checkpoint) == opened.root:
        raise ExportError(
            f"{opened.root} has LoRAs merged into a bundle's weights, and diffusers would read those without them",
            needed="the checkpoint that the bundle came from, and the LoRAs",
            fix=f"latentrt verify {opened.root} --against CHECKPOINT --lora FILE:STRENGTH",
        )


def _verify(opened: Bundle, source: Checkpoint, steps: int) -> Iterator[Check]:
    cut = (*opened.spec.named(CONDITIONER), *opened.spec.named(SHALLOW))  # out of the denoiser
    whole = [name for name in opened.spec.networks if name not in cut]
    if sorted(networks_of(source)) != sorted(whole):
        theirs, ours = ", ".join(networks_of(source)), ", ".join(whole)
        raise incomparable(f"{source.id} has the networks {theirs}, and {opened.root} {ours}")
    with plain_folder(source) as folder, Engine.load(opened.root, check_hashes=False, cache=False) as engine:
        if opened.spec.golden:
            yield Check("golden", "known runs", "relative error", worst_error(engine), TOLERANCE)
        yield from network_checks(engine, folder)
        pipelines = Theirs(folder, engine)
        yield from step_checks(engine.schedule, steps, pipelines.scheduler)
        yield from image_checks(engine, pipelines, steps)
        yield batch_check(engine)
