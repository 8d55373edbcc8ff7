"""Signatures of graphs: which arrays fit them, and how large their symbolic dimensions are.

A dimension is a number, a name ("height"), or a name times and divided by numbers ("8*height", "(height//8)"). Arrays
fit where one size for each name makes every dimension match.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import GraphSpec, TensorSpec, dimension
from latentrt.errors import NetworkError

Arrays = Mapping[str, NDArray[Any]]
Shape = tuple[int, ...]


class Shaped(Protocol):
    """An array on the host or on a device."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...


def symbols(tensors: Sequence[TensorSpec]) -> list[str]:
    """Return the names in symbolic dimensions, each once, in the order of the tensors."""
    return list(dict.fromkeys(dimension(side).name for t in tensors for side in t.shape if isinstance(side, str)))


def shape_of(tensor: TensorSpec, sizes: Mapping[str, int]) -> Shape:
    """Return a tensor's shape for these sizes of its symbolic dimensions. Raise KeyError where a size is missing."""
    sides = ((side, dimension(side)) if isinstance(side, str) else (side, None) for side in tensor.shape)
    return tuple(int(side) if symbol is None else symbol.of(sizes[symbol.name]) for side, symbol in sides)


def sizes_of(tensors: Sequence[TensorSpec], shapes: Mapping[str, Shape]) -> dict[str, int]:
    """Return the sizes of the names in the tensors' symbolic dimensions that follow from the shapes.

    A dimension that is a bare name gives its size; one that is a multiple gives it where no other does.
    """
    pairs = [
        (dimension(side), size)
        for tensor in tensors
        for side, size in zip(tensor.shape, shapes.get(tensor.name, ()), strict=False)
        if isinstance(side, str)
    ]
    sizes: dict[str, int] = {}
    for symbol, size in sorted(pairs, key=lambda pair: (pair[0].divisor, pair[0].factor)):
        sizes.setdefault(symbol.name, size * symbol.divisor // symbol.factor)
    return sizes


def check_feeds(graph: GraphSpec, feeds: Mapping[str, Shaped]) -> dict[str, int]:
    """Refuse arrays that are not the inputs of a graph; return the sizes of its symbolic dimensions.

    Raises:
        NetworkError: a name, dtype or shape is off; symbolic dimensions must agree with each other.
    """
    return _check(graph, graph.inputs, feeds, "inputs")


def check_arrays(graph: GraphSpec, arrays: Mapping[str, Shaped]) -> dict[str, int]:
    """Refuse arrays that are not the inputs and outputs of a graph; return the sizes of its symbolic dimensions.

    Raises:
        NetworkError: a name, dtype or shape is off.
    """
    return _check(graph, (*graph.inputs, *graph.outputs), arrays, "arrays")


def _check(graph: GraphSpec, tensors: Sequence[TensorSpec], arrays: Mapping[str, Shaped], what: str) -> dict[str, int]:
    names = sorted(tensor.name for tensor in tensors)
    if sorted(arrays) != names:
        raise NetworkError(f"{graph.path} was fed {what} {sorted(arrays)}", needed=f"{what} {names}")
    sizes = sizes_of(graph.inputs, {name: array.shape for name, array in arrays.items()})
    for tensor in tensors:
        array = arrays[tensor.name]
        fits = len(array.shape) == len(tensor.shape) and tuple(array.shape) == shape_of(tensor, sizes)
        if array.dtype != np.dtype(tensor.dtype) or not fits:
            found = f"{graph.path} was fed {tensor.name} of {array.dtype} {tuple(array.shape)}"
            raise NetworkError(found, needed=f"{tensor.dtype} {tensor.shape}{_told(tensor, sizes)}")
    return sizes


def _told(tensor: TensorSpec, sizes: Mapping[str, int]) -> str:
    """Return the sizes of the symbolic dimensions, for an error's text."""
    told = ", ".join(f"{name} {sizes[name]}" for name in symbols([tensor]) if name in sizes)
    return f" with {told}" if told else ""
