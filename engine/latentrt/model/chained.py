"""ControlNets and T2I-Adapters on a GPU: networks that every row of a job calls in turn, before the denoiser.

They pass residuals on in memory of the device. There all lanes are called together, so each runs in every row: its
scale is 0 in rows where it does not act, and its factors are for lanes on which it does not. Adding zeros is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.errors import BackendError
from latentrt.model.control import BEFORE, FACTORS, SCALE, Applied, ControlNet
from latentrt.model.inputs import Inputs, Sides
from latentrt.model.predictor import OWN, Predictor
from latentrt.runtime.base import Bound, DeviceNetwork, Network
from latentrt.runtime.signature import Arrays
from latentrt.sampling.table import Table


class Chained(NamedTuple):
    """What a job's rows call and read, its ControlNets among it.

    Attributes:
        predictor: None for the model's own.
        sides, table: the job's own, with what ControlNets read.
        controls: those that are called one by one, on the host.
    """

    predictor: Predictor | None
    sides: Sides
    table: Table
    controls: tuple[Applied, ...]


class Chains:
    """The add-ons of an engine in turn, before its denoiser; each choice of them is one predictor.

    Args:
        denoiser: reads residuals, on a GPU.
        nets: all that the engine has.

    Raises:
        BackendError: one gives residuals in another dtype than the next one reads.
    """

    def __init__(self, denoiser: Network, nets: Sequence[ControlNet]) -> None:
        self._denoiser = denoiser
        self._known: dict[tuple[str, ...], Predictor] = {}
        if nets:
            self._predictor(nets)

    def __call__(self, controls: tuple[Applied, ...], sides: Sides, table: Table) -> Chained:
        """Return what a job with these ControlNets calls and reads."""
        lanes = len(controls[0].sides)
        told = [{**side, **_read(controls, lane)} for lane, side in enumerate(sides.lanes(lanes))]
        scalars = {f"{one.net.name}.{SCALE}": one.scales.astype(np.float64) for one in controls}
        return Chained(
            self._predictor([one.net for one in controls]),
            Sides(told[0], told[-1]),
            replace(table, scalars={**table.scalars, **scalars}),
            (),
        )

    def _predictor(self, nets: Sequence[ControlNet]) -> Predictor:
        names = tuple(net.name for net in nets)
        if names not in self._known:
            links = _links(nets)
            _check_dtypes([*links, self._denoiser])
            self._known[names] = Predictor([*links, self._denoiser])
        return self._known[names]


def _read(controls: Sequence[Applied], lane: int) -> dict[str, NDArray[np.float32]]:
    """Return what ControlNets read of a lane, by their names."""
    told: dict[str, NDArray[np.float32]] = {}
    for one in controls:
        side = one.sides[lane]
        if side is None:
            acting: Inputs = next(each for each in one.sides if each is not None)
            side = {**acting, FACTORS: np.zeros_like(acting[FACTORS])}
        told |= {f"{one.net.name}.{name}": array for name, array in side.items()}
    return told


def _links(nets: Sequence[ControlNet]) -> list[Renamed]:
    """Return networks under names of their own; each adds to the residuals of the last one before it that gives them.

    The last one to give a residual gives it under the denoiser's name for it.
    """
    last = {tensor.name: net for net in nets for tensor in net.body.graph.outputs}
    links, before = [], dict[str, str]()
    for net in nets:
        graph = net.body.graph
        names = {tensor.name: f"{net.name}.{tensor.name}" for tensor in graph.inputs if tensor.name not in OWN}
        names |= {f"{residual}{BEFORE}": given for residual, given in before.items()}
        own = {each.name: each.name if last[each.name] is net else f"{net.name}.{each.name}" for each in graph.outputs}
        before |= own
        links.append(Renamed(net.body, names | own))
    return links


def _check_dtypes(networks: Sequence[Network]) -> None:
    """Raise BackendError where one gives residuals in another dtype than the next one reads."""
    given: dict[str, str] = {}
    for network in networks:
        for tensor in network.graph.inputs:
            if given.get(tensor.name, tensor.dtype) != tensor.dtype:
                raise BackendError(
                    f"{tensor.name} is given in {given[tensor.name]} and read in {tensor.dtype}",
                    needed="one dtype for each residual",
                    fix="export the add-ons and the model again with this version",
                )
        given |= {tensor.name: tensor.dtype for tensor in network.graph.outputs}


class Renamed:
    """A network whose tensors have other names.

    Args:
        network: on a device.
        names: the new ones by the old ones.
    """

    def __init__(self, network: DeviceNetwork, names: Mapping[str, str]) -> None:
        self._network, self._names = network, names
        inputs, outputs = (
            tuple(TensorSpec(names.get(each.name, each.name), each.dtype, each.shape) for each in tensors)
            for tensors in (network.graph.inputs, network.graph.outputs)
        )
        self.graph = replace(network.graph, inputs=inputs, outputs=outputs)

    @property
    def gpu(self) -> Gpu:
        """See `DeviceNetwork.gpu`."""
        return self._network.gpu

    @property
    def best_lanes(self) -> int:
        """See `DeviceNetwork.best_lanes`."""
        return self._network.best_lanes

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[np.float32]]:
        """See `Network`."""
        own = self._network.graph
        made = self._network({each.name: feeds[self._names.get(each.name, each.name)] for each in own.inputs})
        return {self._names.get(name, name): array for name, array in made.items()}

    def bind(self, arrays: Mapping[str, DeviceArray]) -> Bound:
        """See `DeviceNetwork.bind`."""
        own = (*self._network.graph.inputs, *self._network.graph.outputs)
        return self._network.bind({each.name: arrays[self._names.get(each.name, each.name)] for each in own})

    def close(self) -> None:
        """Do nothing: the network is its ControlNet's."""
