"""Let a graph read its weights where they are: in the checkpoint's safetensors.

A safetensors file is an 8-byte length, a JSON header and raw little-endian tensors; ONNX's external data is a file
name, an offset and a length. So an initializer can point into the safetensors, and weights exist once.
https://github.com/huggingface/safetensors#format, https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from safetensors.numpy import save_file

from latentrt.bundle.tensors import open_tensors
from latentrt_export.graphs.passes import PREFIX, is_weight

DTYPES: Mapping[str, type[np.generic]] = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "BOOL": np.bool_,
}
INLINE = 16_384  # bytes: constants of the graph up to a causal mask of 77 x 77 stay in the graph


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: `length` bytes at `offset` of the file."""

    path: Path
    name: str
    dtype: str
    offset: int
    length: int

    def read(self) -> NDArray[np.generic]:
        """Return the tensor, flat, mapped from the file."""
        if self.length == 0:
            return np.empty(0, DTYPES[self.dtype])
        data = np.memmap(self.path, np.uint8, "r", self.offset, (self.length,))
        return data.view(DTYPES[self.dtype])


@dataclass(frozen=True, slots=True)
class Shared:
    """Bytes that a graph reads from files that were there before, and from its sidecar."""

    shared: int
    sidecar: int


def share_weights(model: ir.Model, files: Sequence[Path], sidecar: Path, *, small: bool = False) -> Shared:
    """Point every weight of the graph at its bytes in `files`, which lie in the folder of the graph.

    Weights stored in half precision are read through a Cast to float32, which a runtime folds when it loads the graph.
    Small constants stay in the graph, and small weights unless `small`; all else that is not in the files is written to
    `sidecar`, another safetensors. Weights that lie outside the graph already stay where they are.
    """
    store = Store(files)
    others = [v for v in model.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    own = [v for v in model.graph.initializers.values() if v not in others]
    found = {v: s for v in own if (s := store.find(v))}
    there = {(v.const_value.location, v.const_value.offset, v.const_value.nbytes) for v in others}
    shared = sum(s.length for s in set(found.values())) + sum(size for _, _, size in there)
    rest = [v for v in own if v not in found and (_size(v) > INLINE or (small and is_weight(v)))]
    if rest:
        sidecar.touch()
        mode = sidecar.stat().st_mode  # safetensors would let nobody else read it
        save_file({_plain_name(v): np.ascontiguousarray(_array(v)) for v in rest}, sidecar)
        sidecar.chmod(mode)
        written = {s.name: s for s in read_header(sidecar)}
        found |= {v: written[_plain_name(v)] for v in rest}
    casts = [cast for value, stored in found.items() if (cast := _point_at(model.graph, value, stored))]
    model.graph.insert_before(model.graph[0], casts)
    return Shared(shared, sidecar.stat().st_size if rest else 0)


class Store:
    """The tensors of some safetensors files, found by name or, where loading renamed them, by content."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._tensors = {stored.name: stored for path in files for stored in read_header(path)}
        self._used: set[str] = set()

    def find(self, value: ir.Value) -> Stored | None:
        """Return the stored tensor with exactly an initializer's numbers; each is used for one initializer only."""
        name = value.name or ""
        if not name.startswith(PREFIX):
            return None
        array = _array(value).reshape(-1)
        for stored in self._candidates(name.removeprefix(PREFIX)):
            if stored.name not in self._used and _same(stored, array):
                self._used.add(stored.name)
                return stored
        return None

    def _candidates(self, name: str) -> Iterator[Stored]:
        """Yield the tensor of that name, then longer names (text_model.…), then all: VAEs of 2022 have other names."""
        if name in self._tensors:
            yield self._tensors[name]
        yield from (s for s in self._tensors.values() if s.name.endswith("." + name))
        yield from self._tensors.values()


def read_header(path: Path) -> list[Stored]:
    """Return every tensor of a safetensors file whose dtype a graph can read."""
    entries = open_tensors(path).entries.items()
    return [Stored(path, name, e.dtype, e.offset, e.length) for name, e in entries if e.dtype in DTYPES]


def _same(stored: Stored, array: NDArray[np.generic]) -> bool:
    """Return whether the stored tensor, widened to the array's dtype, equals the array, bit for bit."""
    kind = np.dtype(DTYPES[stored.dtype])
    if stored.length != array.size * kind.itemsize or kind.itemsize > array.dtype.itemsize:
        return False
    widened = stored.read().astype(array.dtype, copy=False)
    return bool(np.array_equal(widened.view(np.uint8), array.view(np.uint8)))


def _point_at(graph: ir.Graph, value: ir.Value, stored: Stored) -> ir.Node | None:
    """Replace an initializer by one that points at `stored`; return the Cast it needs, if any."""
    assert value.const_value is not None
    want, have = value.const_value.dtype, ir.DataType.from_numpy(np.dtype(DTYPES[stored.dtype]))
    shape = ir.Shape(value.const_value.shape)
    tensor = ir.ExternalTensor(
        stored.path.name, stored.offset, stored.length, have, shape=shape, name=stored.name, base_dir=stored.path.parent
    )
    pointer = ir.Value(name=stored.name, shape=shape, type=ir.TensorType(have), const_value=tensor)
    cast = None if have == want else ir.node("Cast", [pointer], attributes={"to": want}, name=f"{stored.name}.cast")
    replacement = pointer
    if cast is not None:
        replacement = cast.outputs[0]
        replacement.name, replacement.shape, replacement.type = f"{stored.name}.float", shape, ir.TensorType(want)
    ir.convenience.replace_all_uses_with(value, replacement)
    del graph.initializers[str(value.name)]
    graph.register_initializer(pointer)
    return cast


def _array(value: ir.Value) -> NDArray[np.generic]:
    assert value.const_value is not None
    array: NDArray[np.generic] = value.const_value.numpy()
    return array


def _size(value: ir.Value) -> int:
    return _array(value).nbytes


def _plain_name(value: ir.Value) -> str:
    return str(value.name).removeprefix(PREFIX)
