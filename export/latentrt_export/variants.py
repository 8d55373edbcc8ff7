"""The graphs beside a network's float32 one: half precision, ONNX Runtime on one device, with residuals or LoRAs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.bundle.spec import (
    ADAPTED,
    CONDITIONER,
    CONTROLLED,
    DENOISER,
    FEATURED,
    FP16,
    FP16_ORT_CUDA,
    FP32,
    FP32_ORT_CPU,
    LORA,
    PROMPTED,
    TEXT_ENCODER,
    Islands,
    ModelSpec,
    NetworkSpec,
    TensorSpec,
    Variant,
)
from latentrt.errors import ExportError
from latentrt_export.checkpoint.files import read_json
from latentrt_export.describe import signature
from latentrt_export.graphs.cpu_graph import cpu_path, for_cpu
from latentrt_export.graphs.cuda_graph import cuda_path, for_cuda
from latentrt_export.graphs.fused.adapters import read_adapters_fused
from latentrt_export.graphs.half import half_path, to_half
from latentrt_export.graphs.parts.adapters import adapted_path, read_adapters
from latentrt_export.graphs.parts.control import adapted_skips, control_path, name_sides, read_residuals
from latentrt_export.graphs.parts.image_prompts import prompted_path, read_image_prompts
from latentrt_export.graphs.ranges import measure_networks, overflowing, too_large

# By the variants that LoRAs of each lane can be inputs of.
READERS = {
    **dict.fromkeys((FP32, FP32_ORT_CPU, FP16), read_adapters),
    FP16_ORT_CUDA: read_adapters_fused,
}


def add_control(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write the denoiser's graphs again with residuals of ControlNets as inputs, and with features of T2I-Adapters too.

    The former compute to the bit what the plain ones do where residuals are zeros; features in the middle of a graph
    change how runtimes fuse it. Other denoisers than UNets that take them stay as they are, and those without text.
    """
    if not spec.draws or not spec.named(TEXT_ENCODER):
        return spec
    adapted = adapted_skips(read_json(root / spec.denoiser / "config.json"))
    for ending, skips in ((CONTROLLED, ()), (FEATURED, adapted))[: 1 + bool(adapted)]:
        spec = _with_residuals(root, spec, ending, skips)
    return spec


def _with_residuals(root: Path, spec: ModelSpec, ending: str, adapted: Sequence[int]) -> ModelSpec:
    network = spec.networks[spec.denoiser]
    variants = dict(network.variants)
    for name, source in ((FP32, FP32), (FP32_ORT_CPU, FP32_ORT_CPU), (FP16, FP16), (FP16_ORT_CUDA, FP16)):
        if name not in network.variants:
            continue
        model, known = ir.load(root / network.variants[source].path), network.variants[name]
        given = read_residuals(model, adapted)
        if not given:
            return spec
        if name == FP16_ORT_CUDA:
            for_cuda(model)
        name_sides(given)
        path = control_path(known.path, ending)
        ir.save(model, root / path)
        inputs = tuple(replace(each, dtype="float32") for each in signature(given))
        dtypes = {each.name: each.dtype for each in signature(given) if each.dtype != "float32"}
        variants[name + ending] = replace(
            known, path=path, nodes=len(model.graph), dtypes={**known.dtypes, **dtypes}, inputs=inputs
        )
    return replace(spec, networks={**spec.networks, spec.denoiser: replace(network, variants=variants)})


def add_half(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write every network's half graph beside the float32 one, and beside that its form for ONNX Runtime on CUDA.

    Nodes that would overflow in one small run stay in float32.
    """
    networks, measured = {}, measure_networks(root, spec)
    given = [spec.networks[name].outputs for name in (*spec.named(CONDITIONER), *spec.named(DENOISER))]
    passed = [tensor.name for tensors in given for tensor in tensors if tensor.name != "out"]
    between = {key: own[key] for own in measured.values() for key in passed if key in own}
    exact = too_large(between, passed)
    for name, own in measured.items():
        network, ranges = spec.networks[name], {**own, **between}
        path = network.variants[FP32].path
        model = ir.load(root / path)
        largest = float(np.max([*own.values()]))  # keeps a NaN
        if not math.isfinite(largest):
            raise ExportError(f"the {name} computes numbers that are not finite", needed="a sound checkpoint")
        islands = Islands(float(f"{largest:.3g}"), overflowing(model, ranges))
        to_half(model, islands.nodes, exact)
        half = replace(save_variant(root, half_path(path), model, network), islands=islands)
        for_cuda(model)
        cuda = save_variant(root, cuda_path(path), model, network)
        networks[name] = replace(network, variants={**network.variants, FP16: half, FP16_ORT_CUDA: cuda})
    return replace(spec, networks={**spec.networks, **networks})


def add_cpu(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write the denoiser's graph for ONNX Runtime on the CPU, if there is one and it differs from the float32 one."""
    if not spec.draws:
        return spec
    network = spec.networks[spec.denoiser]
    path = network.variants[FP32].path
    model = ir.load(root / path)
    if not for_cpu(model, {"height": spec.latents.height, "width": spec.latents.width}):
        return spec
    variants = {**network.variants, FP32_ORT_CPU: save_variant(root, cpu_path(path), model, network)}
    return replace(spec, networks={**spec.networks, spec.denoiser: replace(network, variants=variants)})


def add_adapters(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write the graphs that LoRAs change again, so that they take LoRAs of each lane (`graphs.parts.adapters`).

    Raises:
        ExportError: there is nothing that a LoRA could change, or graphs of a network take different ones.
    """
    networks = dict(spec.networks)
    for role in (TEXT_ENCODER, CONDITIONER, DENOISER):
        for name in spec.named(role):
            own = {key: one for key, one in spec.networks[name].variants.items() if not key.endswith(ADAPTED)}
            readers = {key: READERS[kind] for key in own if (kind := key.partition("+")[0]) in READERS}
            made = {
                f"{key}{ADAPTED}": _with_inputs(root, own[key], adapted_path, read) for key, read in readers.items()
            }
            taken = {key: one for key, one in made.items() if one is not None}
            _check_alike(name, taken)
            networks[name] = replace(spec.networks[name], variants=own | taken)
    if not any(key.endswith(ADAPTED) for one in networks.values() for key in one.variants):
        found = f"{spec.id} has no products with weights in files that LoRAs could change"
        raise ExportError(found, needed="a bundle that was exported from a checkpoint")
    return replace(spec, networks=networks)


def _check_alike(network: str, taken: Mapping[str, Variant]) -> None:
    """Raise ExportError where the graphs of a network do not take the same LoRAs."""
    modules = {key: {each for each in one.inputs if each.name.startswith(LORA)} for key, one in taken.items()}
    first, *others = modules.values() or [set()]
    if odd := sorted({each.name for other in others for each in first ^ other}):
        found = f"only some of the {network}'s graphs take {odd[0]}, of {len(odd)} such"
        raise ExportError(found, needed="the same LoRAs in all", fix="report it; export without --adapters")


def add_image_prompts(root: Path, spec: ModelSpec) -> ModelSpec:
    """Write the denoiser's graphs for ONNX Runtime on a CPU again, with and without residuals of ControlNets and
    T2I-Adapters, so that they look at pictures (`graphs.parts.image_prompts`).

    Denoisers without cross attention to a text stay as they are.
    """
    if not spec.draws or not spec.named(TEXT_ENCODER):
        return spec
    network = spec.networks[spec.denoiser]
    own = {key: one for key, one in network.variants.items() if not key.endswith((PROMPTED, ADAPTED))}
    plain = [key for key in own if key.partition("+")[0] in (FP32, FP32_ORT_CPU)]
    made = {f"{key}{PROMPTED}": _with_inputs(root, own[key], prompted_path, read_image_prompts) for key in plain}
    variants = {**network.variants} | {key: one for key, one in made.items() if one is not None}
    return replace(spec, networks={**spec.networks, spec.denoiser: replace(network, variants=variants)})


def _with_inputs(
    root: Path, known: Variant, path_of: Callable[[str], str], read: Callable[[ir.Model], Sequence[ir.Value]]
) -> Variant | None:
    """Write a graph again with the inputs that `read` adds; None where it adds none."""
    model = ir.load(root / known.path)
    given = signature(read(model))
    if not given:
        return None
    path = path_of(known.path)
    ir.save(model, root / path)
    inputs = (*known.inputs, *(TensorSpec(each.name, "float32", each.shape) for each in given))
    dtypes = {**known.dtypes, **{each.name: each.dtype for each in given if each.dtype != "float32"}}
    return replace(known, path=path, nodes=len(model.graph), dtypes=dtypes, inputs=inputs)


def save_variant(root: Path, path: str, model: ir.Model, network: NetworkSpec) -> Variant:
    """Write a graph of a network, and return what the manifest says of it."""
    ir.save(model, root / path)
    own = (*network.inputs, *network.outputs)
    theirs = (*signature(model.graph.inputs), *signature(model.graph.outputs))
    dtypes = {a.name: b.dtype for a, b in zip(own, theirs, strict=True) if a.dtype != b.dtype}
    return Variant(path, model.opset_imports[""], len(model.graph), dtypes)
