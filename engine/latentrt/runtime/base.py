"""The interface of a runtime: load a graph, call it with named arrays; on a GPU, queue it on a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.runtime.signature import Arrays


class Network(Protocol):
    """A loaded graph: named arrays in, named arrays out, in the dtypes of the graph's signature."""

    @property
    def graph(self) -> GraphSpec:
        """The graph's signature."""

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run the graph once; return every output of the graph's signature."""

    def close(self) -> None:
        """Free its memory."""


def call(network: Network, feeds: Arrays) -> dict[str, NDArray[Any]]:
    """Call a network whose graph may be half: floats are fed in its dtypes, and come back as float32.

    Feeds that the network does not read are left out.
    """
    arrays = {t.name: feeds[t.name].astype(t.dtype, copy=False) for t in network.graph.inputs if t.name in feeds}
    return {name: array.astype(np.float32, copy=False) for name, array in network(arrays).items()}


class Facts(NamedTuple):
    """Properties of how a backend runs networks, set by each backend and by nothing else.

    Attributes:
        fixed_lanes: every call of the denoiser has all lanes; idle ones are computed too.
        one_stream: networks are queued on one stream, so that only one thread may use them. Otherwise two may call
            different networks at the same time.
        exact: the numbers are those of the golden runs: float32 on a CPU.
        captures: calls are captured in CUDA graphs unless the caller says otherwise.
        replaces: networks are loaded with `Bundle.replaced`; a backend without it may not be given such a bundle.
        adapts: networks that take LoRAs as inputs run here, those of the variants with `ADAPTED`.
        cores: a call with at least so many entries in its batch computes so many at the same time, one on each core.
    """

    fixed_lanes: bool = False
    one_stream: bool = False
    exact: bool = True
    captures: bool = False
    replaces: bool = False
    adapts: bool = False
    cores: int = 1


class Backend(Protocol):
    """A way to run graphs on one device.

    Attributes:
        name: "onnxruntime", "tensorrt", ...
        device: "cpu" or "cuda".
        precision: "fp32", "fp16" or "int8".
        variants: names of the graphs that it can run, the preferred one first.
        facts: see `Facts`.
        gpu: the GPU in whose memory its networks, then `DeviceNetwork`s, read and write; None on a CPU.
    """

    name: str
    device: str
    precision: str
    variants: tuple[str, ...]
    facts: Facts

    @property
    def gpu(self) -> Gpu | None: ...

    def load(self, bundle: Bundle, network: str) -> Network:
        """Load a bundle's network ("unet", ...) in one of this backend's variants."""


class Bound(Protocol):
    """A network bound to arrays in device memory."""

    def enqueue(self) -> None:
        """Queue one call on the device's stream; it may be captured."""

    def close(self) -> None:
        """Release the binding; the arrays stay."""


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
        """Bind every input and output of the graph to an array; symbolic dimensions take the arrays' sizes.

        Raises:
            NetworkError: names, dtypes or shapes do not fit the signature.
            PlanError: no plan serves these shapes.
        """
