"""Check that a file has every weight of its networks, and copy them into diffusers' layout, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from latentrt.bundle.tensors import Entry, Tensors, header_of
from latentrt.errors import ExportError
from latentrt_export.checkpoint.single.pieces import Network, Piece

DTYPES = ("F16", "BF16", "F32")
CHUNK = 16 * 2**20  # bytes in memory


def check_weights(files: Mapping[str, Tensors], networks: Mapping[str, Network]) -> None:
    """Refuse a file that lacks a weight of its network, or has one of another shape or a dtype that no graph reads.

    Raises:
        ExportError: the network and the weight are named.
    """
    for name, network in networks.items():
        entries = files[name].entries
        missing = [piece.source for piece in network.pieces if piece.source not in entries]
        if missing:
            raise ExportError(
                f"the {name} lacks {missing[0]} ({len(missing)} of {len(network.pieces)} weights are missing)",
                needed="every weight of the network",
                fix="get the whole file",
            )
        for piece in network.pieces:
            _check(name, piece, entries[piece.source])


def write_weights(path: Path, tensors: Tensors, pieces: Sequence[Piece]) -> None:
    """Write a network's safetensors, in the file's own dtypes; at most one transposed tensor is in memory.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as target, tensors.path.open("rb") as source:
        target.write(header_of({piece.name: (tensors.entries[piece.source].dtype, piece.shape) for piece in pieces}))
        for piece in pieces:
            _copy(source, target, tensors.entries[piece.source], piece)


def _check(network: str, piece: Piece, entry: Entry) -> None:
    if _trimmed(entry.shape) != _trimmed(piece.source_shape):
        raise ExportError(
            f"the {network}'s {piece.source} has the shape {list(entry.shape)}", needed=str(list(piece.source_shape))
        )
    if entry.dtype not in DTYPES:
        raise ExportError(
            f"the {network}'s {piece.source} is {entry.dtype}",
            needed=f"one of {', '.join(DTYPES)}",
            fix="get the model in float16, or convert it",
        )


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without ones at its end: a 1 x 1 convolution has the numbers of a linear layer."""
    sizes = list(shape)
    while sizes and sizes[-1] == 1:
        sizes.pop()
    return tuple(sizes)


def _copy(source: BinaryIO, target: BinaryIO, entry: Entry, piece: Piece) -> None:
    if piece.transposed:
        source.seek(entry.offset)
        bits = np.frombuffer(source.read(entry.length), np.dtype(f"u{entry.length // math.prod(entry.shape)}"))
        target.write(bits.reshape(piece.source_shape).T.tobytes())
        return
    left = entry.length if piece.third is None else entry.length // 3
    source.seek(entry.offset + (piece.third or 0) * left)
    while left:
        data = source.read(min(left, CHUNK))
        target.write(data)
        left -= len(data)
