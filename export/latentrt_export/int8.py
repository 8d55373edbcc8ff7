"""Write a denoiser's 8-bit graph for CPUs: measure ranges in a few pictures, and what its pictures then lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import FP32, FP32_ORT_CPU, INT8_ORT_CPU, GraphSpec, ModelSpec
from latentrt.engine import Engine
from latentrt.errors import ExportError
from latentrt.golden import example
from latentrt.runtime.base import Backend, Network
from latentrt.runtime.onnxruntime import OrtBackend
from latentrt.runtime.signature import Arrays
from latentrt_export.graphs.int8 import int8_path, to_int8, watched
from latentrt_export.graphs.ranges import open_session
from latentrt_export.variants import save_variant

SIDE = 64  # of the latents at most
STEPS = 10
PROMPTS = (
    *("a photograph of an astronaut riding a horse", "a red apple", "a portrait of an old man, oil on canvas"),
    *("a city street at night in the rain", "a cat", "mountains and a lake, watercolour"),
)


def add_int8(root: Path, spec: ModelSpec) -> tuple[ModelSpec, str]:
    """Write the denoiser's 8-bit graph beside its others.

    Args:
        root: the bundle's folder.
        spec: of the bundle, with all its other graphs.

    Returns:
        The spec with the graph, and a note of what it was found to lose.

    Raises:
        ExportError: the denoiser has nothing to compute with 8 bits.
    """
    watch = Watch(spec.denoiser)
    exact = _latents(Bundle(root, spec, {}), watch)
    graph, network = spec.graph(spec.denoiser, *watch.variants), spec.networks[spec.denoiser]
    model = ir.load(root / graph.path)
    if not to_int8(model, watch.ranges):
        raise ExportError(f"--int8 for {spec.id}", needed="convolutions or products with weights", fix="leave it out")
    path = int8_path(network.variants[FP32].path)
    variants = {**network.variants, INT8_ORT_CPU: save_variant(root, path, model, network)}
    spec = replace(spec, networks={**spec.networks, spec.denoiser: replace(network, variants=variants)})
    ours = _latents(Bundle(root, spec, {}), OrtBackend(precision="int8"))
    loss = median(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in zip(ours, exact, strict=True))
    return spec, f"int8: latents of {len(exact)} pictures differ from float32's by {loss:.3f} (relative L2, median)"


def _latents(bundle: Bundle, backend: Backend) -> list[NDArray[np.float32]]:
    """Return the last latents of pictures of PROMPTS, or of as many without a prompt."""
    with Engine(bundle, backend, resident=False) as engine:
        settings, pictures = example(engine.model, SIDE)
        prompted = engine.model.text is not None
        prompts: Sequence[str | None] = PROMPTS if prompted else [None] * len(PROMPTS)
        jobs = engine.requests(prompts, settings | {"steps": STEPS, "seed": 0}, pictures)
        for job in jobs:  # one after the other, as memory allows
            engine.run([job])
        return [job.latents for job in jobs]


class Watch:
    """ONNX Runtime on the CPU, which records the ranges of one network's tensors that `to_int8` needs."""

    name, device, precision = "onnxruntime", "cpu", FP32
    variants: tuple[str, ...] = (FP32_ORT_CPU, FP32)
    gpu = None

    def __init__(self, network: str) -> None:
        self.ranges: dict[str, tuple[float, float]] = {}
        self._network, self._plain = network, OrtBackend()
        self.facts = self._plain.facts

    def load(self, bundle: Bundle, network: str) -> Network:
        """Load a network, the one that is watched with more outputs."""
        if network != self._network:
            return self._plain.load(bundle, network)
        return WatchedNetwork(bundle, bundle.spec.graph(network, *self.variants), self.ranges)


class WatchedNetwork:
    """A float32 graph that records the least and the greatest number of each tensor that is `watched`."""

    def __init__(self, bundle: Bundle, graph: GraphSpec, ranges: dict[str, tuple[float, float]]) -> None:
        path = bundle.path(graph.path)
        model = ir.load(path)
        self.graph, self._ranges = graph, ranges
        self._names = watched(model)
        self._outputs = [tensor.name for tensor in graph.outputs]
        _add_ends(model.graph, self._names)
        self._session: Any = open_session(model, path.parent)

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; return the graph's own outputs."""
        results = self._session.run(None, dict(feeds))
        own = dict(zip(self._outputs, results, strict=False))
        ends = results[len(self._outputs) :]
        for name, low, high in zip(self._names, ends[::2], ends[1::2], strict=True):
            before = self._ranges.get(name, (np.inf, -np.inf))
            self._ranges[name] = (min(before[0], float(low)), max(before[1], float(high)))
        return own

    def close(self) -> None:
        """Drop the session, and with it its weights."""
        self._session = None


def _add_ends(graph: ir.Graph, names: Iterable[str]) -> None:
    """Make the least and the greatest number of each tensor further outputs."""
    values = {value.name: value for node in graph for value in node.outputs}
    values |= {value.name: value for value in graph.inputs}
    for name in names:
        for op in ("ReduceMin", "ReduceMax"):
            node = ir.node(op, [values[name]], attributes={"keepdims": 0})
            result = node.outputs[0]
            result.name, result.dtype, result.shape = f"{name}.{op}", ir.DataType.FLOAT, ir.Shape(())
            graph.append(node)
            graph.outputs.append(result)
