"""A backend for tests: networks made of Python functions, with an optional delay."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP32, GraphSpec
from latentrt.cuda.gpu import Gpu
from latentrt.runtime.base import Facts
from latentrt.runtime.signature import Arrays, check_feeds, shape_of

Function = Callable[[Arrays], dict[str, NDArray[Any]]]


class FakeBackend:
    """Loads no file: each graph becomes a function of its feeds.

    Args:
        functions: by the graph's path (as in the manifest); others return zeros of their signature's shapes.
        seconds: how long every call takes at least.
    """

    name = "fake"
    device = "cpu"
    precision = FP32
    variants: tuple[str, ...] = (FP32,)
    facts = Facts()
    gpu: Gpu | None = None

    def __init__(self, functions: Mapping[str, Function] | None = None, seconds: float = 0.0) -> None:
        self.functions = dict(functions or {})
        self.seconds = seconds

    def load(self, bundle: Bundle, network: str) -> FakeNetwork:
        """Return a network of a graph; its file is not read."""
        graph = bundle.spec.graph(network, *self.variants)
        return FakeNetwork(graph, self.functions.get(graph.path, zeros(graph)), self.seconds)


class FakeNetwork:
    """A function behind a graph's signature; `calls` counts its calls."""

    def __init__(self, graph: GraphSpec, function: Function, seconds: float = 0.0) -> None:
        self.graph = graph
        self.function = function
        self.seconds = seconds
        self.calls = 0

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Check the feeds against the signature, wait, call the function."""
        check_feeds(self.graph, feeds)
        self.calls += 1
        if self.seconds:
            time.sleep(self.seconds)
        return self.function(feeds)

    def close(self) -> None:
        """Do nothing."""


def zeros(graph: GraphSpec) -> Function:
    """Return a function that returns zeros. A symbolic dimension has the inputs' size, "8*height" eight times it."""

    def function(feeds: Arrays) -> dict[str, NDArray[Any]]:
        sizes = check_feeds(graph, feeds)
        return {tensor.name: np.zeros(shape_of(tensor, sizes), tensor.dtype) for tensor in graph.outputs}

    return function
