"""What the engine asks of a backend: load a graph, call it with named arrays; on a GPU, queue it on a stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.manifest import GraphSpec, TensorSpec
from latentrt.cuda.base import DeviceArray, Gpu
from latentrt.errors import NetworkError

Arrays = Mapping[str, NDArray[Any]]


class Network(Protocol):
    """A loaded graph: named arrays in, named arrays out, in the dtypes of the graph's signature."""

    @property
    def graph(self) -> GraphSpec:
        """The graph's signature."""

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once; the result has every output of the graph's signature."""

    def close(self) -> None:
        """Give its memory back."""


class Backend(Protocol):
    """A way to run graphs on one device."""

    name: str
    device: str
    precision: str

    @property
    def captures(self) -> bool:
        """Whether its networks' calls are captured in CUDA graphs unless the caller says otherwise."""

    @property
    def gpu(self) -> Gpu | None:
        """The GPU that its networks run on, `DeviceNetwork`s then; None on a CPU."""

    def load(self, bundle: Bundle, network: str) -> Network:
        """Load a bundle's network ("unet", ...) in this backend's precision."""


class Bound(Protocol):
    """A network tied to arrays in device memory."""

    def enqueue(self) -> None:
        """Queue one call on the device's stream; it may be captured."""

    def close(self) -> None:
        """Give it up; the arrays stay."""


@runtime_checkable
class DeviceNetwork(Network, Protocol):
    """A loaded graph that can also read and write device memory."""

    @property
    def gpu(self) -> Gpu:
        """The device whose memory and stream it uses."""

    @property
    def best_lanes(self) -> int:
        """The batch that it was built for; for networks that take any, that of one guided picture."""

    def bind(self, arrays: Mapping[str, DeviceArray]) -> Bound:
        """Tie every input and output of the graph to an array; symbolic dimensions take the arrays' sizes.

        Raises:
            NetworkError: names, dtypes or shapes do not fit the signature.
            PlanError: no plan serves these shapes.
        """


def check_arrays(graph: GraphSpec, arrays: Mapping[str, DeviceArray]) -> dict[str, int]:
    """Refuse arrays that do not fit a graph's signature, inputs and outputs; the sizes of its symbolic dimensions.

    Raises:
        NetworkError: a name, dtype or shape is off.
    """
    names = {tensor.name for tensor in (*graph.inputs, *graph.outputs)}
    if set(arrays) != names:
        raise _mismatch(graph, f"arrays {sorted(arrays)}", f"arrays {sorted(names)}")
    sizes: dict[str, int] = {}
    for tensor in (*graph.inputs, *graph.outputs):
        array, shape = arrays[tensor.name], tensor.shape
        if tensor in graph.outputs:
            shape = tuple(size_of(side, sizes) for side in shape)
        if array.dtype != np.dtype(tensor.dtype) or not _fits(TensorSpec("", "", shape), array.shape, sizes):
            found = f"{tensor.name} of {array.dtype} {array.shape}"
            raise _mismatch(graph, found, f"{tensor.dtype} {tensor.shape}")
    return sizes


def size_of(side: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension as a number: "8*height" is eight times the height, "(height//8)" an eighth of it.

    Raises:
        KeyError: it depends on a dimension that has no size.
    """
    if isinstance(side, int):
        return side
    parts = re.fullmatch(r"(?:(\d+)\*)?\(?(\w+?)(?://(\d+))?\)?", side)
    if parts is None:
        raise KeyError(side)
    factor, name, divisor = parts.groups()
    return int(factor or 1) * sizes[name] // int(divisor or 1)


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
    return NetworkError(f"{graph.path} was fed {found}", needed=needed, fix="pass arrays of the graph's signature")
