"""The initializers of an ONNX file: what it reads from the safetensors beside it, and where.

An ONNX file is a protobuf message. Only what is needed of it is read here, so that the engine does without the library:
ModelProto.graph (7), GraphProto.initializer (5), and of TensorProto dims (1), data_type (2), name (8), external_data
(13). https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from latentrt.errors import BundleError

GRAPH, INITIALIZER = 7, 5
DIMS, DATA_TYPE, NAME, EXTERNAL = 1, 2, 8, 13
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # how a field is written
Value = int | memoryview


class Initializer(NamedTuple):
    """A weight of a graph.

    Attributes:
        name, shape: in the graph.
        dtype: ONNX's number of it.
        file: beside the graph, where its bytes lie; None: in the graph.
        offset: of the first of them in the file.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    file: str | None
    offset: int


def initializers(path: Path) -> list[Initializer]:
    """Return the initializers of an ONNX file's graph.

    Raises:
        BundleError: it cannot be read, or is no such file.
    """
    try:
        model = memoryview(path.read_bytes())
        graphs = [value for number, value in _fields(model) if number == GRAPH]
        return [
            _initializer(_bytes(value))
            for graph in graphs
            for number, value in _fields(_bytes(graph))
            if number == INITIALIZER
        ]
    except (OSError, IndexError, ValueError) as error:
        raise BundleError(f"{path} cannot be read ({error})", needed="an ONNX graph") from error


def _initializer(tensor: memoryview) -> Initializer:
    shape: list[int] = []
    name, dtype, external = "", 0, {"location": "", "offset": "0"}
    for number, value in _fields(tensor):
        if number == DIMS:
            shape += [value] if isinstance(value, int) else _packed(value)
        elif number == DATA_TYPE and isinstance(value, int):
            dtype = value
        elif number == NAME:
            name = str(_bytes(value), "utf-8")
        elif number == EXTERNAL:
            key, text = (str(_bytes(part), "utf-8") for _, part in _fields(_bytes(value)))
            external[key] = text
    return Initializer(name, tuple(shape), dtype, external["location"] or None, int(external["offset"]))


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Yield the number and the value of each field of a message. Raise ValueError or IndexError where it is none."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            whole, at = _varint(message, at)
            yield number, whole
            continue
        if kind == BYTES:
            size, at = _varint(message, at)
        elif kind in (FIXED64, FIXED32):
            size = 8 if kind == FIXED64 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
        if at + size > len(message):
            raise ValueError("it is cut")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """Return a whole number and where it ends."""
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at


def _packed(values: memoryview) -> list[int]:
    numbers, at = [], 0
    while at < len(values):
        value, at = _varint(values, at)
        numbers.append(value)
    return numbers


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return value
