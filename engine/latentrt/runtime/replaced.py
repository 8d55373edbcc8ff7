"""Weights that ONNX Runtime takes in the places of those in a bundle's files, when it loads a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from numpy.typing import NDArray

from latentrt.adapters.memory import EXPORT
from latentrt.bundle.bundle import Bundle
from latentrt.bundle.initializers import initializers
from latentrt.bundle.spec import GraphSpec
from latentrt.errors import BackendError
from latentrt.runtime.base import Backend


class Weight(NamedTuple):
    """A weight in its place's shape, and ONNX's number of its dtype (bfloat16 lies in a uint16)."""

    array: NDArray[Any]
    dtype: int


Weights = Mapping[str, Weight]  # by the names of a graph's initializers
NONE: Weights = {}
REPLACING = ("onnxruntime", "tensorrt", "tensorrt-rtx", "tensorrt-lean")


def replaced_in(bundle: Bundle, graph: GraphSpec) -> Weights:
    """Return the weights of a graph that are replaced.

    Raises:
        BundleError: the graph cannot be read.
    """
    if not bundle.replaced:
        return NONE
    folder = PurePosixPath(graph.path).parent
    places = {each: (f"{folder}/{each.file}", each.offset) for each in initializers(bundle.path(graph.path))}
    return {
        each.name: Weight(bundle.replaced[place].reshape(each.shape), each.dtype)
        for each, place in places.items()
        if each.file is not None and place in bundle.replaced
    }


def same_weights(one: Bundle, other: Bundle, graph: GraphSpec) -> bool:
    """Return whether a graph reads the same weights in two bundles of the same files. Raise as `replaced_in`."""
    ours, theirs = replaced_in(one, graph), replaced_in(other, graph)
    return ours.keys() == theirs.keys() and all(
        weight.array.tobytes() == theirs[name].array.tobytes() for name, weight in ours.items()
    )


def check_replaces(backend: Backend) -> None:
    """Refuse a backend that takes no weights in memory. Raise BackendError."""
    if not backend.facts.replaces:
        raise BackendError(f"LoRAs in memory with {backend.name}", needed=f"one of {', '.join(REPLACING)}", fix=EXPORT)


def set_weights(options: Any, weights: Weights) -> None:
    """Give weights to an `onnxruntime.SessionOptions`; the session reads these and not the files."""
    if weights:
        from onnxruntime import OrtValue

        make = OrtValue.ortvalue_from_numpy_with_onnx_type
        values = [make(weight.array, weight.dtype) for weight in weights.values()]
        options.add_external_initializers(list(weights), values)
