"""The networks that a row calls: the denoiser, or networks that compute some of its inputs and then the denoiser.

A network's outputs are the inputs of the same names of later networks; other inputs are inputs of the predictor.
Host and device put networks together in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.model.inputs import Inputs
from latentrt.runtime.base import Bound, DeviceNetwork, Network, call
from latentrt.runtime.signature import Shape, shape_of, sizes_of

Float32 = NDArray[np.float32]
OWN = ("sample", "timestep")  # inputs that a row fills itself


class Predictor:
    """Networks in the order of their calls; the last one is the denoiser, whose output is "out"."""

    def __init__(self, networks: Sequence[Network]) -> None:
        self._networks = tuple(networks)

    @property
    def inputs(self) -> dict[str, TensorSpec]:
        """The predictor's inputs by name, "sample" and "timestep" among them."""
        given: set[str] = set()
        found: dict[str, TensorSpec] = {}
        for network in self._networks:
            found |= {tensor.name: tensor for tensor in network.graph.inputs if tensor.name not in given}
            given |= {tensor.name for tensor in network.graph.outputs}
        return found

    @property
    def output(self) -> TensorSpec:
        """The denoiser's output."""
        return next(tensor for tensor in self._networks[-1].graph.outputs if tensor.name == "out")

    def __call__(self, sample: Float32, timestep: Float32, inputs: Inputs) -> Float32:
        """Predict.

        Args:
            sample: (lanes, channels, height, width), already scaled by c_in.
            timestep: (lanes,), in training timesteps, fractions allowed.
            inputs: the others by name, each with a leading lane axis.

        Returns:
            The denoiser's output, float32 of the sample's shape.
        """
        known = {"sample": sample, "timestep": timestep, **inputs}
        for network in self._networks:
            known |= call(network, known)
        return known["out"]

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

    @property
    def _on_device(self) -> tuple[DeviceNetwork, ...]:
        return cast(tuple[DeviceNetwork, ...], self._networks)


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
