"""Known runs of a new bundle."""

from __future__ import annotations

from pathlib import Path

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.golden import Golden
from latentrt.bundle.spec import ModelSpec
from latentrt.engine import Engine
from latentrt.golden import measure
from latentrt.runtime import open_backend


def golden_runs(root: Path, spec: ModelSpec) -> tuple[Golden, ...]:
    """Measure the golden runs of a bundle that has no manifest yet (the hook of `export_bundle`)."""
    with Engine(Bundle(root, spec, {}), open_backend("onnxruntime")) as engine:
        return measure(engine)
