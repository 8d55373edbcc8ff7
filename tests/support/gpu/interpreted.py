"""ONNX Runtime on CUDA without a GPU: its graphs, node by node on the host, in the memory of an emulated device.

The fused operators are those of `tests.support.ort.contrib`, which round where the CUDA kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP16, FP16_ORT_CUDA, GraphSpec
from latentrt.cuda.array import DeviceArray
from latentrt.runtime.base import Facts
from latentrt.runtime.signature import Arrays, check_arrays, check_feeds
from tests.support.gpu.host_gpu import HostGpu, view
from tests.support.ort.contrib import interpret


class InterpretedBackend:
    """What `OrtBackend("cuda", gpu=gpu)` would be."""

    name, device, precision = "onnxruntime", "cuda", FP16
    variants = (FP16_ORT_CUDA,)
    facts = Facts(fixed_lanes=True, one_stream=True, exact=False, adapts=True)

    def __init__(self, gpu: HostGpu) -> None:
        self.gpu = gpu

    def load(self, bundle: Bundle, network: str) -> InterpretedNetwork:
        """See `Backend.load`."""
        graph = bundle.spec.graph(network, *self.variants)
        return InterpretedNetwork(bundle.path(graph.path), graph, self.gpu)


class InterpretedNetwork:
    """A graph that is read as it is: what the CUDA provider would fuse besides is not."""

    best_lanes = 1

    def __init__(self, path: Path, graph: GraphSpec, gpu: HostGpu) -> None:
        self.graph, self.gpu = graph, gpu
        self._model, self._folder = ir.load(path), path.parent

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """See `Network`."""
        check_feeds(self.graph, feeds)
        names = [tensor.name for tensor in self._model.graph.outputs]
        return dict(zip(names, interpret(self._model, self._folder, feeds), strict=True))

    def bind(self, arrays: Mapping[str, DeviceArray]) -> InterpretedBound:
        """See `DeviceNetwork.bind`."""
        check_arrays(self.graph, arrays)
        return InterpretedBound(self, arrays)

    def close(self) -> None:
        """Do nothing."""


class InterpretedBound:
    """A graph with its arrays."""

    def __init__(self, network: InterpretedNetwork, arrays: Mapping[str, DeviceArray]) -> None:
        self._network, self._arrays = network, arrays

    def enqueue(self) -> None:
        """See `Bound.enqueue`."""
        self._network.gpu.call(self._run)

    def _run(self) -> None:
        feeds = {tensor.name: view(self._arrays[tensor.name]) for tensor in self._network.graph.inputs}
        for name, array in self._network(feeds).items():
            view(self._arrays[name])[...] = array

    def close(self) -> None:
        """See `Bound.close`."""
