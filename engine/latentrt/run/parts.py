"""What each lane reads besides what rows fill, in device memory: in parts where the lanes' shapes differ.

The lanes of a job may differ in the length of their texts; then each part of the lanes is a call of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.spec import LORA, TensorSpec
from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.errors import DeviceMemoryError
from latentrt.runtime.base import Bound
from latentrt.runtime.signature import Shape, shape_of, sizes_of

Copies = list[tuple[DeviceArray, DeviceArray]]
Zeros = Callable[[Sequence[int], Any], DeviceArray]
MIB = 2**20


def parts_of(lanes: int, count: int) -> list[range]:
    """Return so many parts of the lanes, neighbours together."""
    ends = [number * lanes // count for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


class LaneInputs:
    """The memory of inputs that jobs bring for their lanes; lanes without a job have zeros.

    Args:
        gpu: copies.
        zeros: allocates memory, which its owner frees.
        tensors: the inputs by name.
        known: all inputs of the predictor, from which sizes follow.
        parts: of the lanes.
        shapes: of each part's inputs, by name, without the axis of the lanes; others are in their signature's own.
        latents: the shape of a lane's latents.
        sizes: of symbolic dimensions that shapes do not tell.

    Attributes:
        arrays: by part and name.

    Raises:
        DeviceMemoryError: there is not enough memory.
    """

    def __init__(
        self,
        gpu: Gpu,
        zeros: Zeros,
        tensors: Mapping[str, TensorSpec],
        known: Sequence[TensorSpec],
        parts: Sequence[range],
        shapes: Sequence[Mapping[str, Shape]],
        latents: Shape,
        sizes: Mapping[str, int],
    ) -> None:
        self._gpu, self._parts = gpu, parts
        self._filled: dict[int, set[str]] = {}
        self.arrays: list[dict[str, DeviceArray]] = []
        for lanes, own in zip(parts, shapes, strict=True):
            given = {name: (len(lanes), *shape) for name, shape in own.items()}
            found = {**sizes, **sizes_of(known, {"sample": (len(lanes), *latents), **given})}
            check_room(gpu, tensors.values(), found)
            made = {name: given.get(name) or shape_of(tensor, found) for name, tensor in tensors.items()}
            self.arrays.append({name: zeros(shape, tensors[name].dtype) for name, shape in made.items()})

    def fill(self, lane: int, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Queue the copies of one lane's inputs; names that are not inputs of the predictor are left out.

        One zero that is repeated (strides of 0) is not copied: the lane has zeros already, or gets them here.
        """
        filled = self._filled.setdefault(lane, set())
        for name, array in inputs.items():
            target = self._target(lane, name)
            if target is None:
                continue
            if any(array.strides) or array.any():
                self._gpu.upload(array.astype(target.dtype, copy=False)[None], target)
                filled.add(name)
            elif name in filled:
                self._gpu.fill_zero(target)
                filled.remove(name)

    def clear(self, lane: int) -> None:
        """Queue zeros for all that was copied to a lane."""
        for name in self._filled.pop(lane, ()):
            target = self._target(lane, name)
            assert target is not None
            self._gpu.fill_zero(target)

    def _target(self, lane: int, name: str) -> DeviceArray | None:
        part, own = next(pair for pair in zip(self._parts, self.arrays, strict=True) if lane in pair[0])
        return own[name].part(lane - part.start) if name in own else None


def check_room(gpu: Gpu, tensors: Iterable[TensorSpec], sizes: Mapping[str, int]) -> None:
    """Refuse LoRAs of all lanes where they are larger than the memory that is free.

    Args:
        gpu: the device.
        tensors: inputs of the predictor, those of LoRAs among them.
        sizes: of their symbolic dimensions, "rank" and "batch" for the lanes among them.

    Raises:
        DeviceMemoryError: they are.
    """
    shapes = [(shape_of(each, sizes), each.dtype) for each in tensors if each.name.startswith(LORA)]
    needed, free = sum(DeviceArray(0, shape, np.dtype(dtype)).bytes for shape, dtype in shapes), gpu.memory()[0]
    if needed > free:
        loras = f"LoRAs of rank {sizes['rank']} in {sizes['batch']} lanes"
        raise DeviceMemoryError(
            f"{loras} take {needed // MIB} MiB of GPU memory, and {free // MIB} are free",
            needed="room for the largest rank in every lane",
            fix="load the engine with a smaller adapter_rank (--lora-rank), or with fewer lanes",
        )


class Parts:
    """A network bound once for each part, called in turn (`Bound`).

    Arrays that all lanes share are copied for a part's call and back: a part of one may begin at an address that a
    network does not take.

    Args:
        gpu: copies.
        bind: binds a network to arrays.
        zeros: allocates memory, which its owner frees.
        parts: the lanes of each call.
        own: what each part reads in its own shapes.
        shared: arrays of all lanes, by name.
        given: the names of those that the network computes; the others it reads.
    """

    def __init__(
        self,
        gpu: Gpu,
        bind: Callable[[Mapping[str, DeviceArray]], Bound],
        zeros: Zeros,
        parts: Sequence[range],
        own: Sequence[Mapping[str, DeviceArray]],
        shared: Mapping[str, DeviceArray],
        given: Collection[str],
    ) -> None:
        self._gpu = gpu
        self._calls: list[tuple[Copies, Bound, Copies]] = []
        try:
            for lanes, inputs in zip(parts, own, strict=True):
                copies = {name: zeros((len(lanes), *array.shape[1:]), array.dtype) for name, array in shared.items()}
                pairs = {name: (array.part(lanes.start, len(lanes)), copies[name]) for name, array in shared.items()}
                reads = [pair for name, pair in pairs.items() if name not in given]
                writes = [(copy, array) for name, (array, copy) in pairs.items() if name in given]
                self._calls.append((reads, bind({**copies, **inputs}), writes))
        except BaseException:
            self.close()
            raise

    def enqueue(self) -> None:
        """See `Bound.enqueue`."""
        for reads, bound, writes in self._calls:
            for source, target in reads:
                self._gpu.copy(source, target)
            bound.enqueue()
            for source, target in writes:
                self._gpu.copy(source, target)

    def close(self) -> None:
        """See `Bound.close`."""
        for _, bound, _ in self._calls:
            bound.close()
