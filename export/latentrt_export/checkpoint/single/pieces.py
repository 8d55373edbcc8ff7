"""How one tensor of a diffusers network is made of one of a file; the tables of all networks are made of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentrt.errors import ExportError

Config = dict[str, Any]
Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


@dataclass(frozen=True, slots=True)
class Piece:
    """One tensor of a network.

    Attributes:
        source: its name in the file.
        name, shape: in the network.
        third: which third of the file's tensor it is, along the first axis (0, 1 or 2); None: it is the whole.
        transposed: whether the file has its axes in the other order.
    """

    source: str
    name: str
    shape: Shape
    third: int | None = None
    transposed: bool = False

    @property
    def source_shape(self) -> Shape:
        """The shape that the file's tensor must have, but for axes of 1 at its end (1 x 1 convolutions)."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return shape if self.third is None else (3 * shape[0], *shape[1:])


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the checkpoint to be: its diffusers class, its config, and where each weight comes from."""

    kind: str
    config: Config
    pieces: Sequence[Piece]


def both(source: str, name: str, *shape: int) -> Iterator[Piece]:
    """Yield a layer's weight, of this shape, and its bias."""
    yield Piece(f"{source}.weight", f"{name}.weight", shape)
    yield Piece(f"{source}.bias", f"{name}.bias", shape[:1])


def prefixed(prefix: str, pieces: Sequence[Piece]) -> list[Piece]:
    """Return pieces of a file that has a prefix before every name of this network."""
    return [replace(piece, source=prefix + piece.source) for piece in pieces]


def without(prefix: str, shapes: Shapes) -> dict[str, Shape]:
    """Return the shapes whose names begin with a prefix, without it."""
    return {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}


def size(shapes: Shapes, name: str, axis: int, network: str) -> int:
    """Return one size of a weight that a config is read from.

    Raises:
        ExportError: the file has no such weight, or one of fewer axes or with nothing in it.
    """
    shape = shapes.get(name)
    if shape is None:
        raise ExportError(
            f"the {network} has no {name}", needed="every weight of the network", fix="get the whole file"
        )
    if len(shape) <= axis or not shape[axis]:
        raise ExportError(
            f"the {network}'s {name} has the shape {list(shape)}", needed=f"more than {axis} axes, not empty"
        )
    return shape[axis]


def count(shapes: Shapes, pattern: str) -> int:
    """Return how many of pattern.0, pattern.1, ... there are: the names of layers in a row."""
    number = 0
    while any(name.startswith(f"{pattern}.{number}.") for name in shapes):
        number += 1
    return number


def heads_of(width: int, network: str) -> int:
    """Return the number of attention heads of 64 channels.

    Raises:
        ExportError: the width is no multiple of 64.
    """
    if width % 64:
        raise ExportError(f"the {network} has {width} channels", needed="a multiple of 64: heads of 64 channels each")
    return width // 64
