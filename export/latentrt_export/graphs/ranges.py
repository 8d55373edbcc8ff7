"""Measure how large the numbers in a network get, in float32: nodes that float16 could not hold become an island.

float16 ends at 65504, and a graph does not say how far it goes; some VAEs go beyond. So every network runs once, in
float32, with the largest absolute value of each tensor as a further output.

The runs are small (16 x 16 latents at most): a largest value grows with the number of values it is taken from, but
slowly. The margin is for that, and for prompts that were not measured (docs/export.md has numbers).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import (
    CONDITIONER,
    CONTROL,
    DECODER,
    ENCODER,
    FP32,
    HINT,
    MODEL,
    SHALLOW,
    GraphSpec,
    ModelSpec,
)
from latentrt.cuda.gpu import Gpu
from latentrt.engine import Engine
from latentrt.golden import example
from latentrt.model.control import FACTORS, SCALE
from latentrt.model.vae.codec import Vae
from latentrt.runtime.base import Facts
from latentrt.runtime.onnxruntime import load_onnxruntime
from latentrt.runtime.signature import Arrays, shape_of
from latentrt_export.graphs.half import LARGEST, constants, timing
from latentrt_export.graphs.lower import SCORES, lower

Ranges = Mapping[str, float]
MARGIN = 4.0
SIDE = 16  # of the latents at most
STEPS = 4
PROMPTS = ("a photograph of an astronaut riding a horse", "", "blurry, low quality")
SUFFIX = ".largest"


def measure_ranges(path: Path, feeds: Iterable[Arrays]) -> dict[str, float]:
    """Return the largest absolute value of every float tensor that a float32 graph computes, over several runs.

    Args:
        path: a graph of a bundle, its weights beside it.
        feeds: the inputs of each run.

    Returns:
        By the tensor's name; an Attention's scores, which it keeps inside, by its output's name and `.scores`.
    """
    gauge = Gauge(path, {})
    for arrays in feeds:
        gauge(arrays)
    return gauge.ranges


def overflowing(model: ir.Model, ranges: Ranges, margin: float = MARGIN) -> tuple[str, ...]:
    """Return the names of the nodes of a float32 graph that read or write a value within `margin` of float16's end."""

    def fits(node: ir.Node) -> bool:
        names = [str(value.name) for value in (*node.inputs, *node.outputs) if value is not None]
        names += [f"{value.name}{SCORES}" for value in node.outputs]
        return not too_large(ranges, names, margin)

    return tuple(node.name for node in model.graph if not fits(node))


def too_large(ranges: Ranges, names: Iterable[str], margin: float = MARGIN) -> tuple[str, ...]:
    """Return those of the named tensors that are within `margin` of float16's end, or not finite."""
    return tuple(name for name in names if not ranges.get(name, 0.0) <= LARGEST / margin)


def measure_networks(root: Path, spec: ModelSpec) -> dict[str, dict[str, float]]:
    """Return the ranges of each network of a bundle in one small run: real prompts, denoising, decoding, encoding.

    The denoiser is the bundle's own, so it sees every noise level and the VAE sees true latents.
    """
    gauges = Gauges()
    bundle = Bundle(root, spec, {})
    if spec.kind != MODEL:
        return _measure_control(gauges, bundle)
    if not spec.draws:
        return _measure_vae(gauges, bundle)
    with Engine(bundle, gauges, resident=False) as engine:
        settings, pictures = example(engine.model, SIDE)
        settings |= {"steps": STEPS}
        if engine.model.text is not None:
            settings["guidance"] = 5.0
            if "negative_prompt" in engine.model.fields:
                settings["negative_prompt"] = PROMPTS[2]
            for prompt in PROMPTS:
                engine.model.text.encode(prompt)
        jobs = engine.requests([PROMPTS[0] if engine.model.text is not None else None], settings, pictures)
        engine.run(jobs)
        image = engine.model.codec.decode(jobs[0].latents[None])
    for name in spec.named(ENCODER):
        gauges.load(bundle, name)({"image": image})
    shallow = dict.fromkeys(spec.named(SHALLOW), gauges.ranges[spec.denoiser])  # some of the same tensors
    return gauges.ranges | shallow


def _measure_vae(gauges: Gauges, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Return the ranges of a VAE alone: it encodes noise, and decodes that and latents as a UNet makes them."""
    spec, draw = bundle.spec.latents, np.random.default_rng(0)
    (decoder,), encoders = bundle.spec.named(DECODER), bundle.spec.named(ENCODER)
    encoder = gauges.load(bundle, encoders[0]) if encoders else None
    vae = Vae(gauges.load(bundle, decoder), encoder, spec)
    latents = [draw.standard_normal((spec.channels, SIDE, SIDE), np.float32)]
    if encoder is not None:
        latents.append(
            vae.encode(draw.uniform(-1, 1, (3, SIDE * spec.factor, SIDE * spec.factor)).astype(np.float32)).mean
        )
    vae.decode(np.stack(latents))
    return gauges.ranges


def _measure_control(gauges: Gauges, bundle: Bundle) -> dict[str, dict[str, float]]:
    """Return the ranges of an add-on: of noise at several levels, under texts of normal numbers and a drawn hint."""
    spec, draw = bundle.spec, np.random.default_rng(0)
    names = (*spec.named(HINT), *spec.named(CONDITIONER), *spec.named(CONTROL))
    networks = {name: gauges.load(bundle, name) for name in names}
    sizes = {"batch": 1, "height": SIDE, "width": SIDE, "tokens": 77}
    pixels = SIDE * spec.latents.factor
    channels = spec.networks[spec.named(HINT)[0]].inputs[0].shape[1]
    for level in np.linspace(0, 999, STEPS):
        known = {"picture": draw.uniform(0, 1, (1, int(channels), pixels, pixels)), "timestep": np.array([level])}
        known["time_ids"] = np.array([[pixels, pixels, 0, 0, pixels, pixels]])
        for network in networks.values():
            for tensor in network.graph.inputs:
                ones = tensor.name in (SCALE, FACTORS)
                made = np.ones if ones else draw.standard_normal
                known.setdefault(tensor.name, made(shape_of(tensor, sizes)))
            feeds = {tensor.name: known[tensor.name].astype(tensor.dtype) for tensor in network.graph.inputs}
            known |= network(feeds)
    return gauges.ranges


class Gauges:
    """A backend, ONNX Runtime on the CPU, whose networks also record their ranges."""

    name, device, precision = "onnxruntime", "cpu", FP32
    variants: tuple[str, ...] = (FP32,)
    facts = Facts()
    gpu: Gpu | None = None

    def __init__(self) -> None:
        self.ranges: dict[str, dict[str, float]] = {}

    def load(self, bundle: Bundle, network: str) -> NetworkGauge:
        """Load a network; its ranges continue those of an earlier load."""
        graph = bundle.spec.graph(network, *self.variants)
        return NetworkGauge(bundle.path(graph.path), self.ranges.setdefault(network, {}), graph)


class Gauge:
    """A float32 graph that records the largest absolute value of each tensor it computes."""

    def __init__(self, path: Path, ranges: dict[str, float]) -> None:
        model = ir.load(path)
        self._outputs = [str(value.name) for value in model.graph.outputs]
        own = {value.name for node in model.graph for value in node.outputs}
        lower(model)
        _add_outputs(model.graph, own)
        self._session = open_session(model, path.parent)
        self.ranges = ranges

    def __call__(self, feeds: Arrays) -> dict[str, NDArray[Any]]:
        """Run once; return the graph's own outputs."""
        names = [output.name for output in self._session.get_outputs()]
        results = dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
        for name in names[len(self._outputs) :]:
            value, before = name.removesuffix(SUFFIX), results.pop(name)
            self.ranges[value] = float(np.maximum(before, self.ranges.get(value, 0.0)))  # keeps a NaN
        return results

    def close(self) -> None:
        """Drop the session, and with it its weights."""
        self._session = None


class NetworkGauge(Gauge):
    """A gauge that is also a network of a backend."""

    def __init__(self, path: Path, ranges: dict[str, float], graph: GraphSpec) -> None:
        super().__init__(path, ranges)
        self.graph = graph


def open_session(model: ir.Model, folder: Path) -> Any:
    """Return an ONNX Runtime session on the CPU for a model in memory whose weights lie in `folder`."""
    onnxruntime = load_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    data = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def _add_outputs(graph: ir.Graph, own: Collection[str | None]) -> None:
    """Add the largest absolute value of what a half graph would compute in float16, and of the scores of Attention."""
    skipped = {value for node in timing(graph) for value in node.outputs} | constants(graph)
    for node in list(graph):
        for value in node.outputs:
            named = value.name in own or str(value.name).endswith(SCORES)
            if named and value.dtype == ir.DataType.FLOAT and value not in skipped:
                size = ir.node("Abs", [value])
                largest = ir.node("ReduceMax", size.outputs, attributes={"keepdims": 0})
                graph.extend((size, largest))
                result = largest.outputs[0]
                result.name, result.dtype, result.shape = f"{value.name}{SUFFIX}", value.dtype, ir.Shape(())
                graph.outputs.append(result)
