"""The networks that a row calls: the denoiser, or networks that compute some of its inputs and then the denoiser.

A network's outputs are the inputs of the same names of later networks; other inputs are inputs of the predictor.
Host and device put networks together in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import ADAPTER, RESIDUAL, GraphSpec, NetworkSpec, TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.model.inputs import Inputs
from latentrt.runtime.base import Bound, DeviceNetwork, Network, call
from latentrt.runtime.lazy import LazyNetwork, opened
from latentrt.runtime.signature import Shape, shape_of, sizes_of

Float32 = NDArray[np.float32]
OWN = ("sample", "timestep")  # inputs that a row fills itself
DEEP = "deep"  # features that a shallow call reads again: see `latentrt_export.graphs.parts.shallow`


class Predictor:
    """Networks in the order of their calls; the last one is the denoiser, whose output is "out".

    Args:
        networks: in the order of their calls.
        without_depth: the shallow network: reads the denoiser's output "deep" in place of what is computed below. It is
            loaded at its first use.
    """

    def __init__(self, networks: Sequence[Network], without_depth: LazyNetwork | None = None) -> None:
        self._networks = tuple(networks)
        self._without_depth = without_depth

    @property
    def caches(self) -> bool:
        """Whether rows may be shallow."""
        return self._without_depth is not None

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The predictor's inputs by name, "sample" and "timestep" among them."""
        return inputs_of([network.graph for network in self._networks])

    @property
    def output(self) -> TensorSpec:
        """The denoiser's output."""
        return next(tensor for tensor in self._networks[-1].graph.outputs if tensor.name == "out")

    @property
    def deep(self) -> TensorSpec:
        """The denoiser's output that shallow calls read."""
        return next(tensor for tensor in self._networks[-1].graph.outputs if tensor.name == DEEP)

    def __call__(self, sample: Float32, timestep: Float32, inputs: Inputs) -> Float32:
        """Predict.

        Args:
            sample: (lanes, channels, height, width), already scaled by c_in.
            timestep: (lanes,), in training timesteps, fractions allowed.
            inputs: the others by name, each with a leading lane axis.

        Returns:
            The denoiser's output, float32 of the sample's shape.
        """
        return self._called(self._networks, self._whole(sample, timestep, inputs))["out"]

    def with_deep(self, sample: Float32, timestep: Float32, inputs: Inputs) -> tuple[Float32, Float32]:
        """Predict; return the deep features too, (lanes, channels, height, width), for later `shallow` calls."""
        known = self._called(self._networks, self._whole(sample, timestep, inputs))
        return known["out"], known[DEEP]

    def shallow(self, sample: Float32, timestep: Float32, inputs: Inputs, deep: Float32) -> Float32:
        """Predict with the deep features of an earlier call of the same lanes."""
        assert self._without_depth is not None, "see `caches`"
        known = {"sample": sample, "timestep": timestep, **inputs, DEEP: deep}
        return self._called([self._without_depth], known)["out"]

    def no_residuals(self, sample: Float32) -> dict[str, Float32]:
        """Return zeros for the residuals that the denoiser reads, for these lanes; {} where it reads none.

        Adding them is exact.
        """
        sizes = sizes_of(self._networks[-1].graph.inputs, {"sample": sample.shape})
        read = [tensor for tensor in self._networks[-1].graph.inputs if tensor.name.startswith((RESIDUAL, ADAPTER))]
        return {tensor.name: np.zeros(shape_of(tensor, sizes), np.float32) for tensor in read}

    def _whole(self, sample: Float32, timestep: Float32, inputs: Inputs) -> dict[str, NDArray[Any]]:
        """Return all inputs; residuals that nothing gave are zeros."""
        zeros = {} if f"{RESIDUAL}mid" in inputs else self.no_residuals(sample)
        return {"sample": sample, "timestep": timestep, **zeros, **inputs}

    def _called(self, networks: Sequence[Network], known: Inputs) -> dict[str, NDArray[Any]]:
        known = dict(known)
        for network in networks:
            known |= call(network, known)
        return known

    # ---- On a device

    @property
    def gpu(self) -> Gpu:
        """The device that the networks run on."""
        return self._on_device[-1].gpu

    @property
    def best_lanes(self) -> int:
        """The batch that the denoiser was built for."""
        return self._on_device[-1].best_lanes

    def bind(self, arrays: Mapping[str, DeviceArray], zeros: Callable[[Shape, str], DeviceArray]) -> Bound:
        """Bind the predictor's inputs and "out" to arrays.

        Args:
            arrays: by name.
            zeros: allocates memory for what one network passes to another; its owner frees it.

        Raises:
            NetworkError, PlanError: see `DeviceNetwork.bind`.
        """
        known, bound = dict(arrays), list[Bound]()
        try:
            for network in self._on_device:
                graph = network.graph
                sizes = sizes_of(graph.inputs, {name: array.shape for name, array in known.items()})
                for tensor in graph.outputs:
                    if tensor.name not in arrays:
                        known[tensor.name] = zeros(shape_of(tensor, sizes), tensor.dtype)
                own = {tensor.name: known[tensor.name] for tensor in (*graph.inputs, *graph.outputs)}
                bound.append(network.bind(own))
        except BaseException:
            _InTurn(bound).close()
            raise
        return bound[0] if len(bound) == 1 else _InTurn(bound)

    def bind_shallow(self, arrays: Mapping[str, DeviceArray]) -> Bound:
        """Bind the shallow network to arrays, "deep" and "out" among them. Raise as `bind`."""
        assert self._without_depth is not None, "see `caches`"
        network = cast(DeviceNetwork, self._without_depth.open())
        tensors = (*network.graph.inputs, *network.graph.outputs)
        return network.bind({tensor.name: arrays[tensor.name] for tensor in tensors})

    @property
    def _on_device(self) -> tuple[DeviceNetwork, ...]:
        return cast(tuple[DeviceNetwork, ...], tuple(map(opened, self._networks)))


def inputs_of(networks: Sequence[NetworkSpec | GraphSpec]) -> dict[str, TensorSpec]:
    """Return the inputs of networks that are called in turn: those that no earlier one gives, by name."""
    given: set[str] = set()
    found: dict[str, TensorSpec] = {}
    for network in networks:
        found |= {tensor.name: tensor for tensor in network.inputs if tensor.name not in given}
        given |= {tensor.name for tensor in network.outputs}
    return found


class _InTurn:
    """Bound networks that are called one after the other."""

    def __init__(self, bound: Sequence[Bound]) -> None:
        self._bound = tuple(bound)

    def enqueue(self) -> None:
        for one in self._bound:
            one.enqueue()

    def close(self) -> None:
        for one in self._bound:
            one.close()
