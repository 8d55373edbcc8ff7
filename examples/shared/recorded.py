"""A training step as one CUDA graph: small networks leave a GPU waiting for its host otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

BEFORE = 3  # calls for inputs of a shape before they are recorded: libraries choose and set up in the first ones

Function = Callable[..., dict[str, Tensor]]


class Recorded:
    """A function of tensors on a GPU that is recorded for each kind of input, and from then on launched as one.

    It may not wait for the GPU, nor branch on the values of tensors; Python's numbers stay what they were when it was
    recorded. What it returns is overwritten by the next call with inputs of that kind.
    """

    def __init__(self, function: Function) -> None:
        self._function = function
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]] = {}
        self._stream = torch.cuda.Stream()

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What the function makes of the inputs."""
        kind = tuple((each.shape, each.dtype) for each in inputs)
        if self._seen.setdefault(kind, 0) < BEFORE:
            self._seen[kind] += 1
            return self._aside(inputs)
        if kind not in self._graphs:
            self._graphs[kind] = self._record(inputs)
        graph, places, outputs = self._graphs[kind]
        for place, value in zip(places, inputs, strict=True):
            place.copy_(value)
        graph.replay()
        return outputs

    def _aside(self, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """A plain call, on a stream that is not the default one, as what is to be recorded has to be."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            outputs = self._function(*inputs)
        now.wait_stream(self._stream)
        return outputs

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[torch.cuda.CUDAGraph, list[Tensor], dict[str, Tensor]]:
        graph, places = torch.cuda.CUDAGraph(), [each.clone() for each in inputs]
        with torch.cuda.graph(graph):
            outputs = self._function(*places)
        return graph, places, outputs
