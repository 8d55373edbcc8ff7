"""The first depth: every graph against its torch module, and a network's other graphs against the first."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from latentrt.bundle.spec import (
    CONDITIONER,
    DENOISER,
    ENCODER,
    FP16,
    FP32,
    FP32_ORT_CPU,
    SHALLOW,
    TEXT_ENCODER,
    GraphSpec,
    LatentSpec,
    TensorSpec,
)
from latentrt.engine import Engine
from latentrt.model.conditioners.sizes import ScoredSizes, Sizes
from latentrt.model.predictor import DEEP, inputs_of
from latentrt.model.prompts.encoder import feeds_of
from latentrt.model.text import Text
from latentrt.runtime.base import call
from latentrt.runtime.signature import shape_of
from latentrt_export.graphs.half import emulate
from latentrt_export.graphs.ranges import open_session
from latentrt_export.graphs.wrap import load_network
from latentrt_export.verify.checks import Array, Check, difference, relative_l2, worst
from latentrt_export.verify.reference import PROMPTS, comparing

Arrays = Mapping[str, Array]
NETWORK_BOUND = 2e-5  # relative L2 of a graph's outputs
LARGEST_BOUND = 4e-5  # the largest difference of one number, relative to the largest output
HALF_BOUND = 5e-3  # relative L2 of a float16 graph to the float32 one
ODD_SIDE = 16  # of the second, odd size's latents at most, so that full-size models take seconds


def network_checks(engine: Engine, checkpoint: Path) -> Iterator[Check]:
    """Measure every graph against its torch module in float32, at the model's own size and at an odd one."""
    spec = engine.spec
    for name, own in spec.networks.items():
        if own.role in (CONDITIONER, SHALLOW):  # parts of the denoiser's module, compared with it
            continue
        runs: list[Arrays] = []
        with comparing(name):
            theirs_of = load_network(checkpoint, name, tokens=spec.tokens)
        parts = [*spec.named(CONDITIONER), name] if own.role == DENOISER else [name]
        networks = {part: engine.backend.load(engine.bundle, part) for part in parts}
        inputs = [each.name for each in theirs_of.inputs]
        outputs = [tensor.name for tensor in own.outputs if tensor.name != DEEP]
        pairs: dict[str, list[tuple[Array, Array]]] = {output: [] for output in outputs}
        for prompts, size in zip((PROMPTS, PROMPTS[:1]), sizes_of(spec.latents), strict=True):
            feeds = make_feeds(engine, parts, prompts, size)
            known = dict(feeds)
            for network in networks.values():
                known |= call(network, known)
            runs.append(known)
            with torch.no_grad(), comparing(name):
                theirs = theirs_of.module(**{key: torch.from_numpy(feeds[key]) for key in inputs})
            theirs = theirs if isinstance(theirs, tuple) else (theirs,)
            expected = dict(zip(theirs_of.outputs, theirs, strict=True))
            for output in outputs:
                pairs[output].append((known[output], expected[output].numpy()))
        for output, values in pairs.items():
            with comparing(name):  # outputs of other shapes
                l2 = worst([relative_l2(a, b) for a, b in values])
                largest = worst([difference(a, b) for a, b in values])
            yield Check("network", f"{name}: {output}", "relative L2, worst of 2 sizes", l2, NETWORK_BOUND)
            yield Check("network", f"{name}: {output}", "max abs, relative to the largest", largest, LARGEST_BOUND)
        for shallow in spec.named(SHALLOW) if own.role == DENOISER else ():
            networks[shallow] = engine.backend.load(engine.bundle, shallow)
            l2 = worst([relative_l2(call(networks[shallow], known)["out"], known["out"]) for known in runs])
            yield Check("network", f"{shallow}: out", "relative L2, to the denoiser with that depth", l2, NETWORK_BOUND)
        for part, network in networks.items():
            network.close()
            plain, variants = spec.networks[part].graph(FP32), spec.networks[part].variants
            if network.graph.path != plain.path:
                yield plain_check(engine.bundle.path(plain.path), plain, part, runs)
            if FP16 in variants:
                half = spec.networks[part].graph(FP16)
                yield half_check(engine.bundle.path(half.path), half, part, runs)


def plain_check(path: Path, graph: GraphSpec, name: str, runs: Sequence[Arrays]) -> Check:
    """Measure the plain float32 graph, which other runtimes read, against the one that the engine ran."""
    session = open_session(ir.load(path), path.parent)
    names = [tensor.name for tensor in graph.outputs]
    errors = [
        relative_l2(array, known[output])
        for known in runs
        for output, array in zip(
            names, session.run(names, {tensor.name: known[tensor.name] for tensor in graph.inputs}), strict=True
        )
    ]
    what = f"{name} in {FP32}"
    return Check("network", what, f"relative L2 to {FP32_ORT_CPU}, worst of 2 sizes", worst(errors), NETWORK_BOUND)


def half_check(path: Path, graph: GraphSpec, name: str, runs: Sequence[Arrays]) -> Check:
    """Measure a half graph against its float32 one, on the same feeds, rounding as a GPU would.

    `runs` have its inputs, and what the float32 graph made of them.
    """
    model = ir.load(path)
    emulate(model)
    session = open_session(model, path.parent)
    names = [tensor.name for tensor in graph.outputs]
    errors = []
    for expected in runs:
        narrow = {tensor.name: expected[tensor.name].astype(tensor.dtype) for tensor in graph.inputs}
        for output, array in zip(names, session.run(names, narrow), strict=True):
            errors.append(relative_l2(array.astype(np.float32), expected[output]))
    return Check("network", f"{name} in float16", "relative L2 to float32, worst of 2 sizes", worst(errors), HALF_BOUND)


def make_feeds(engine: Engine, parts: Sequence[str], prompts: Sequence[str], size: tuple[int, int]) -> dict[str, Array]:
    """Return inputs of networks that are called in turn: the prompts' tokens and text states, timesteps, and normal
    numbers for all others.

    `size` is the latents' (height, width).
    """
    spec, text = engine.spec, engine.model.text
    network = spec.networks[parts[-1]]
    if network.role == TEXT_ENCODER:
        assert text is not None
        (own,) = (encoder for encoder in text.encoders if encoder.name == parts[-1])
        ids = np.stack([own.tokenizer.encode(prompt).ids for prompt in prompts])
        return feeds_of(own.network.graph.inputs, ids)
    scale = spec.latents.factor if network.role == ENCODER else 1
    scaled = (size[0] * scale, size[1] * scale)
    return drawn(engine, inputs_of([spec.networks[part] for part in parts]).values(), prompts, scaled)


def drawn(
    engine: Engine, tensors: Iterable[TensorSpec], prompts: Sequence[str], size: tuple[int, int]
) -> dict[str, Array]:
    """Return values of inputs: the prompts' text states, timesteps, sizes, and normal numbers for all others.

    `size` is what the inputs' height and width are.
    """
    spec, draw = engine.spec, np.random.default_rng(0)
    texts = _texts(engine.model.text, prompts)
    height, width = size
    sizes = {"batch": len(prompts), "height": height, "width": width, "tokens": spec.tokens}
    pixels = [side * spec.latents.factor for side in size]
    feeds: dict[str, Array] = {}
    for tensor in tensors:
        shape = shape_of(tensor, sizes)
        if tensor.name in texts:
            feeds[tensor.name] = texts[tensor.name]
        elif tensor.name == "time_ids":
            last = pixels if shape[1] == len(Sizes.NUMBERS) else ScoredSizes.DEFAULTS[:1]
            feeds[tensor.name] = np.array([[*pixels, 0, 0, *last]] * len(prompts), np.float32)
        elif tensor.name == "timestep":
            feeds[tensor.name] = draw.uniform(0, 1000, shape).astype(np.float32)
        elif tensor.name == "sigma":
            feeds[tensor.name] = np.exp(draw.uniform(-3, 3, shape)).astype(np.float32)
        elif tensor.name in ("class_labels", "noise_level"):
            most = spec.classes or spec.max_noise_level or 1000
            feeds[tensor.name] = draw.integers(0, most, shape).astype(tensor.dtype)
        else:
            feeds[tensor.name] = draw.standard_normal(shape, np.float32)
    return feeds


def sizes_of(latents: LatentSpec) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return two (height, width) of latents: the model's own, and one with sides as odd as it takes them."""
    own, step = (latents.height, latents.width), latents.multiple
    if step == 1:
        return own, (min(own[0], ODD_SIDE) - 3, min(own[1], ODD_SIDE) + 2)
    side = max(step, min(own[0], ODD_SIDE) // step * step)
    return own, (side + step, side)


def _texts(text: Text | None, prompts: Sequence[str]) -> dict[str, Array]:
    """What the denoiser is told of prompts, by the names of its inputs."""
    told = [text.encode(prompt) for prompt in prompts] if text is not None else [{}]
    return {name: np.stack([each[name] for each in told]) for name in told[0]}
