"""The other graphs of networks that others made: kept where they compute what the float32 graph does.

The passes that make them know the forms of export's own graphs. Where they stumble over another form, or give other
numbers, the bundle goes without, and a note says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.spec import ENCODER, FP16, FP16_ORT_CUDA, FP32, FP32_ORT_CPU, ModelSpec, NetworkSpec
from latentrt.errors import LatentrtError
from latentrt_export.existing.probe import make_feeds
from latentrt_export.graphs.half import emulate
from latentrt_export.graphs.ranges import SIDE, open_session

Arrays = dict[str, NDArray[Any]]
Add = Callable[[Path, ModelSpec], ModelSpec]
GROUPS = ((FP16, FP16_ORT_CUDA), (FP32_ORT_CPU,))  # a GPU needs every network in half precision, or none
STATES = "encoder_hidden_states"
BOUNDS = {FP16: 1e-2, FP32_ORT_CPU: 1e-4}  # relative L2 to float32


def checked(root: Path, spec: ModelSpec, adds: Sequence[Add]) -> tuple[ModelSpec, tuple[str, ...]]:
    """Add each group of variants to a bundle; leave out a group that cannot be made or computes something else.

    ONNX Runtime on a CPU has no kernels for some operators of the graphs for CUDA: those are kept with the half graphs.

    Args:
        root: the bundle's folder.
        spec: of its float32 graphs.
        adds: write one group of GROUPS each, and return the spec with it.

    Returns:
        The spec with what was kept, and a note for each group that was not.
    """
    notes = []
    for group, add in zip(GROUPS, adds, strict=True):
        try:
            made = add(root, spec)
            why = _worst(root, made, group[0])
        except LatentrtError:
            raise
        except Exception as error:  # the passes assert what they expect
            made, why = spec, f"{type(error).__name__}: {error}"
        if why:
            notes.append(f"graphs in {' and '.join(group)}: left out, {why}")
            made = _without(root, spec)
        spec = made
    return spec, tuple(notes)


def _worst(root: Path, spec: ModelSpec, variant: str) -> str:
    """Return which network computes something else in a variant than in float32; empty where none does."""
    known: Arrays = {}
    for name, network in spec.networks.items():
        feeds = make_feeds(network.inputs, _sizes(spec, network))
        feeds |= {tensor.name: known[tensor.name] for tensor in network.inputs if tensor.name in known}
        exact = _run(root, network, FP32, feeds)
        if "text_states" in exact:
            states, before = exact["text_states"], [known[STATES]] if STATES in known else []
            known[STATES] = np.concatenate([*before, states], axis=-1)
        known |= {key: array for key, array in exact.items() if key != "out"}
        if variant in network.variants:
            for key, array in _run(root, network, variant, feeds).items():
                error = np.linalg.norm(array - exact[key]) / max(float(np.linalg.norm(exact[key])), 1e-30)
                if not error <= BOUNDS[variant]:
                    return f"the {name}'s {key} differs by {error:.1e} (relative L2)"
    return ""


def _sizes(spec: ModelSpec, network: NetworkSpec) -> Mapping[str, int]:
    latents = spec.latents
    sides = [max(min(own, SIDE) // latents.multiple, 1) * latents.multiple for own in (latents.height, latents.width)]
    scale = latents.factor if network.role == ENCODER else 1
    return {"batch": 2, "height": sides[0] * scale, "width": sides[1] * scale, "tokens": spec.tokens}


def _run(root: Path, network: NetworkSpec, variant: str, feeds: Arrays) -> Arrays:
    """Return a network's outputs in float32; half graphs round as on a GPU."""
    graph = network.graph(variant)
    path = root / graph.path
    model = ir.load(path)
    if variant == FP16:
        emulate(model)
    session = open_session(model, path.parent)
    names = [tensor.name for tensor in graph.outputs]
    given = {tensor.name: feeds[tensor.name].astype(tensor.dtype) for tensor in graph.inputs}
    return {name: array.astype(np.float32) for name, array in zip(names, session.run(names, given), strict=True)}


def _without(root: Path, spec: ModelSpec) -> ModelSpec:
    """Remove the graphs of the bundle that its spec does not have."""
    kept = {root / variant.path for network in spec.networks.values() for variant in network.variants.values()}
    for path in set(root.rglob("*.onnx")) - kept:
        path.unlink()
    return spec
