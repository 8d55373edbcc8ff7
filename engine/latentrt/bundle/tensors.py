"""Safetensors by their headers: what a file holds and where; refuses what is none, and what is not whole.

https://github.com/huggingface/safetensors#format: an 8-byte length, a JSON header, raw little-endian tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.errors import ExportError, LatentrtError, UnsafeWeightsError

Kind = type[LatentrtError]  # of the error that a file raises: ExportError for a checkpoint's

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
SIZES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}
MOST_HEADER = 100_000_000  # bytes, as safetensors itself bounds it
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # how numpy reads them
LFS = b"version https://git-lfs"
AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor: `length` bytes at `offset` of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Tensors:
    """A safetensors file: its tensors by name, and the text that its header has beside them."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {name: entry.shape for name, entry in self.entries.items()}

    def bytes_of(self, name: str) -> bytes:
        """Return a tensor's bytes."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.offset)
            return file.read(entry.length)

    def floats(self, name: str) -> NDArray[np.float32]:
        """Return a tensor of one of FLOATS as float32."""
        entry = self.entries[name]
        array = np.frombuffer(self.bytes_of(name), FLOATS[entry.dtype]).reshape(entry.shape)
        if entry.dtype == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32, copy=False)


def as_stored(array: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 numbers rounded to one of FLOATS, to the nearest, as numpy holds them there (bfloat16: uint16)."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    with np.errstate(over="ignore", under="ignore"):
        return array.astype(FLOATS[dtype])


def open_tensors(path: Path, error: Kind = ExportError) -> Tensors:
    """Read the header of a safetensors file.

    Args:
        path: of the file.
        error: what is raised.

    Raises:
        error: it is empty, cut, damaged, a Git LFS pointer, a web page or something else.
        UnsafeWeightsError: it is a pickle under another name.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(LFS))
            _check_start(path, start, error)
            length = int.from_bytes(start[:8], "little")
            if not 2 <= length <= MOST_HEADER:
                raise _damaged(path, "has no safetensors header", error)
            if 8 + length > size:
                raise _damaged(path, f"is cut: its header has {length:,} bytes, and the file {size:,}", error)
            file.seek(8)
            data = file.read(length)
    except OSError as reason:
        raise error(f"{path} cannot be read ({reason.strerror})", needed="a safetensors file") from reason
    header = _parse(path, data, error)
    metadata = header.pop("__metadata__", None)
    entries = {name: _entry(path, name, value, 8 + length, error) for name, value in header.items()}
    _check_places(path, entries, 8 + length, size, error)
    texts = metadata.items() if isinstance(metadata, dict) else ()
    return Tensors(path, entries, {key: value for key, value in texts if isinstance(value, str)})


def header_of(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the start of a safetensors file whose tensors (dtype and shape by name) follow in that order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    data = json.dumps(header).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _check_start(path: Path, start: bytes, error: Kind) -> None:
    """Refuse what is often found in the place of weights, by name."""
    if not start:
        raise _damaged(path, "is empty", error)
    if start.startswith(LFS):
        raise error(f"{path} is a Git LFS pointer, not the file itself", needed="the weights", fix="git lfs pull")
    if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x04")):
        raise UnsafeWeightsError(
            f"{path} holds pickled weights", needed="safetensors; pickles can run code", fix="get the safetensors file"
        )
    if start.lstrip()[:1] == b"<":
        raise _damaged(path, "is a web page", error)


def _parse(path: Path, data: bytes, error: Kind) -> dict[str, Any]:
    try:
        header = json.loads(data)
    except (ValueError, RecursionError) as reason:
        raise _damaged(path, "has a header that is no JSON", error) from reason
    if not isinstance(header, dict):
        raise _damaged(path, "has a header that is no JSON object", error)
    return header


def _entry(path: Path, name: str, value: Any, base: int, error: Kind) -> Entry:
    """Return one tensor of the header, checked: its bytes must be as many as its shape needs."""
    try:
        start, end = value["data_offsets"]
        entry = Entry(str(value["dtype"]), tuple(value["shape"]), base + start, end - start)
        whole = all(type(number) is int and number >= 0 for number in (*entry.shape, start, entry.length))
        known = SIZES.get(entry.dtype)
        if not whole or (known and entry.length != known * math.prod(entry.shape)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as reason:
        raise _damaged(path, f"has a damaged header at {name!r}", error) from reason
    return entry


def _check_places(path: Path, entries: Mapping[str, Entry], end: int, size: int, error: Kind) -> None:
    """Refuse tensors that overlap, leave holes, or do not end with the file; the first one begins at `end`."""
    for name, entry in sorted(entries.items(), key=lambda one: (one[1].offset, one[1].length)):
        if entry.offset != end:
            where = f"{name!r} does not begin where the tensor before it ends"
            raise _damaged(path, f"has a damaged header: {where}", error)
        end = entry.offset + entry.length
    if end != size:
        cut = "is cut" if end > size else "is not whole"
        raise _damaged(path, f"{cut}: its header tells of {end:,} bytes, and the file has {size:,}", error)


def _damaged(path: Path, what: str, error: Kind) -> LatentrtError:
    return error(f"{path} {what}", needed="a whole safetensors file", fix=AGAIN)
