"""Parts of the lanes whose inputs have shapes of their own: texts of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise
from typing import Any

from latentrt.cuda.array import DeviceArray
from latentrt.cuda.gpu import Gpu
from latentrt.runtime.base import Bound

Copies = list[tuple[DeviceArray, DeviceArray]]


def parts_of(lanes: int, count: int) -> list[range]:
    """Return so many parts of the lanes, neighbours together."""
    ends = [number * lanes // count for number in range(count + 1)]
    return [range(start, end) for start, end in pairwise(ends)]


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
        zeros: Callable[[Sequence[int], Any], DeviceArray],
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
