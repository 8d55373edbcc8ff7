"""What the engine asks of a backend: load a graph, call it with named arrays."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.errors import NetworkError
from engine.spec import GraphSpec, TensorSpec

Arrays = Mapping[str, NDArray[Any]]


class Network(Protocol):
    """A loaded graph: named arrays in, named arrays out."""

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once; the result has every output of the graph's signature."""

    def close(self) -> None:
        """Give its memory back."""


class Backend(Protocol):
    """A way to run graphs on one device."""

    name: str
    device: str

    def load(self, path: Path, graph: GraphSpec) -> Network:
        """Load the graph at `path`, whose signature is `graph`."""


def check_feeds(graph: GraphSpec, feeds: Arrays) -> None:
    """Refuse feeds that do not fit a graph's signature.

    Raises:
        NetworkError: a name, dtype or shape is off; symbolic dimensions must agree with each other.
    """
    sizes: dict[str, int] = {}
    for tensor in graph.inputs:
        array = feeds.get(tensor.name)
        if array is None or len(feeds) != len(graph.inputs):
            raise _mismatch(graph, f"inputs {sorted(feeds)}", f"inputs {sorted(t.name for t in graph.inputs)}")
        if array.dtype != np.dtype(tensor.dtype) or not _fits(tensor, array.shape, sizes):
            found = f"{tensor.name} of {array.dtype} {array.shape}"
            raise _mismatch(graph, found, f"{tensor.dtype} {tensor.shape}")


def _fits(tensor: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> bool:
    if len(shape) != len(tensor.shape):
        return False
    return all(
        size == (sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted)
        for wanted, size in zip(tensor.shape, shape, strict=True)
    )


def _mismatch(graph: GraphSpec, found: str, needed: str) -> NetworkError:
    return NetworkError(f"{graph.path} was fed {found}", needed, "pass arrays of the graph's signature")
