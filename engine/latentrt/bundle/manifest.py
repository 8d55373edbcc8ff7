"""`manifest.json`: a ModelSpec as JSON, and back, with every field checked.

A manifest of schema 1 is brought to schema 2 by `manifest1.py` before it is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from latentrt.bundle.golden import Golden
from latentrt.bundle.manifest1 import upgraded
from latentrt.bundle.spec import (
    ADD_ONS,
    CONDITIONER,
    CONTROL,
    DECODER,
    DENOISER,
    ENCODER,
    FP32,
    HINT,
    IP_ADAPTER,
    KINDS,
    ROLES,
    SHALLOW,
    TEXT_ENCODER,
    Correction,
    Defaults,
    Islands,
    LatentSpec,
    ModelSpec,
    NetworkSpec,
    TensorSpec,
    Variant,
    dimension,
)
from latentrt.errors import EXPORT, BundleError
from latentrt.values import is_number, is_text, is_whole

SCHEMA = 2
SCHEMAS = (1, SCHEMA)  # those that can be read
DTYPES = ("float16", "float32", "float64", "int32", "int64", "uint8", "bool")


def model_from(data: Mapping[str, Any], schema: int = SCHEMA) -> ModelSpec:
    """Read the "model" part of a manifest of a schema of SCHEMAS.

    Raises:
        BundleError: a field is missing, unknown or of the wrong kind or out of range; each by its name.
    """
    try:
        spec = _read(data if schema == SCHEMA else upgraded(data))
        check(spec)
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise BundleError(
            f"manifest.json has a model part that cannot be read ({error!r})",
            needed=f"the fields of manifest schema {schema}",
        ) from error
    return spec


def _read(data: Mapping[str, Any]) -> ModelSpec:
    fields = dict(data)
    networks = {name: _network(part) for name, part in fields.pop("networks").items()}
    golden = (Golden(**{**g, "first": tuple(map(float, g["first"]))}) for g in fields.pop("golden", ()))
    corrections = tuple(Correction(**each) for each in fields.pop("corrections", ()))
    latents, defaults = LatentSpec(**fields.pop("latents")), Defaults(**fields.pop("defaults", {}))
    return ModelSpec(
        **fields,
        latents=latents,
        networks=networks,
        defaults=defaults,
        corrections=corrections,
        golden=tuple(golden),
    )


def _network(data: Mapping[str, Any]) -> NetworkSpec:
    fields = dict(data)
    inputs, outputs = (_tensors(fields.pop(key)) for key in ("inputs", "outputs"))
    variants = {name: _variant(part) for name, part in fields.pop("variants").items()}
    return NetworkSpec(inputs=inputs, outputs=outputs, variants=variants, **fields)


def _tensors(data: Iterable[Mapping[str, Any]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(each["name"], each["dtype"], tuple(each["shape"])) for each in data)


def _variant(data: Mapping[str, Any]) -> Variant:
    fields = dict(data)
    islands = fields.pop("islands", None)
    kept = None if islands is None else Islands(islands["largest"], tuple(islands["nodes"]))
    return Variant(islands=kept, inputs=_tensors(fields.pop("inputs", ())), **fields)


def check(spec: ModelSpec) -> None:
    """Check every field's kind and range, so that readers of a manifest need not check again.

    Raises:
        BundleError: the first field that is wrong, by its name.
    """
    _need(is_text(spec.id), "id", spec.id, "text")
    for name in ("revision", "license"):
        value = getattr(spec, name)
        _need(value is None or isinstance(value, str), name, value, "text or null")
    for name in ("zero_negative", "scaled_picture", "keeps_steps", "conditional_only"):
        _need(isinstance(getattr(spec, name), bool), name, getattr(spec, name), "true or false")
    for name in ("classes", "max_noise_level"):
        value = getattr(spec, name)
        _need(value is None or is_whole(value), name, value, "a whole number or null")
    _need(spec.low_schedule is None or is_text(spec.low_schedule), "low_schedule", spec.low_schedule, "text or null")
    _need(isinstance(spec.made, Mapping), "made", spec.made, "an object")
    _check_latents(spec.latents)
    _check_defaults(spec.defaults)
    for name, network in spec.networks.items():
        _need(name.isidentifier(), "networks", name, "networks' names, letters and underscores")
        _check_network(f"networks.{name}", network)
    _check_kind(spec)
    for role in (SHALLOW, DECODER, ENCODER):
        _need(len(spec.named(role)) <= 1, "networks", list(spec.networks), f"at most one with the role {role!r}")
    for correction in spec.corrections:
        texts = (correction.file, correction.key, correction.why)
        _need(all(map(is_text, texts)), "corrections' file, key and why", texts, "text")
    for golden in spec.golden:
        _check_golden(golden)


def _check_kind(spec: ModelSpec) -> None:
    """Check that it is a model with one denoiser and its schedule, a VAE alone, or what is added to a model."""
    _need(spec.kind in KINDS, "kind", spec.kind, f"one of {', '.join(KINDS)}")
    roles = {network.role for network in spec.networks.values()}
    if spec.kind in ADD_ONS:
        acts, more = (CONDITIONER, set[str]()) if spec.kind == IP_ADAPTER else (CONTROL, {CONDITIONER})
        one = len(spec.named(HINT)) == len(spec.named(acts)) == 1
        needed = f"one each with the roles {HINT!r} and {acts!r}, and {' or '.join(more) or 'none'} at most"
        _need(one and roles <= {HINT, acts, *more}, "networks", list(spec.networks), needed)
        _need(spec.schedule is None, "schedule", spec.schedule, "null: there is no denoiser")
        return
    _need(not roles & {HINT, CONTROL}, "networks", list(spec.networks), "those of a model")
    alone = bool(spec.named(DECODER)) and roles <= {DECODER, ENCODER}
    needed = f"one with the role {DENOISER!r}, or those of a VAE alone"
    _need(alone or len(spec.named(DENOISER)) == 1, "networks", list(spec.networks), needed)
    schedule, kind = spec.schedule, "null: there is no denoiser" if alone else "text"
    _need(schedule is None if alone else is_text(schedule), "schedule", schedule, kind)


def _check_latents(latents: LatentSpec) -> None:
    for name in ("channels", "factor", "height", "width", "multiple"):
        value = getattr(latents, name)
        _need(is_whole(value) and 1 <= value <= 65_536, f"latents.{name}", value, "a whole number from 1 to 65536")
    _need(is_number(latents.scale) and latents.scale != 0, "latents.scale", latents.scale, "a finite number, not 0")
    _need(is_number(latents.shift), "latents.shift", latents.shift, "a finite number")


def _check_defaults(defaults: Defaults) -> None:
    _need(is_whole(defaults.steps) and defaults.steps >= 1, "defaults.steps", defaults.steps, "a whole number from 1")
    _need(is_number(defaults.guidance), "defaults.guidance", defaults.guidance, "a finite number")
    _need(defaults.solver is None or is_text(defaults.solver), "defaults.solver", defaults.solver, "text or null")


def _check_network(where: str, network: NetworkSpec) -> None:
    _need(network.role in ROLES, f"{where}.role", network.role, f"one of {', '.join(ROLES)}")
    tokenizer = network.tokenizer
    if network.role == TEXT_ENCODER:
        _need(is_text(tokenizer), f"{where}.tokenizer", tokenizer, "the folder of its tokenizer")
    else:
        _need(tokenizer is None, f"{where}.tokenizer", tokenizer, "null: it reads no text")
    _need(FP32 in network.variants, f"{where}.variants", list(network.variants), f"a graph {FP32!r}")
    own = (*network.inputs, *network.outputs)
    more = (tensor for variant in network.variants.values() for tensor in variant.inputs)
    for tensor in dict.fromkeys((*own, *more)):  # variants have mostly the same ones
        _check_tensor(where, tensor)
    names = {tensor.name for tensor in own}
    for name, variant in network.variants.items():
        _check_variant(f"{where}.variants.{name}", variant, names | {tensor.name for tensor in variant.inputs})


def _check_tensor(where: str, tensor: TensorSpec) -> None:
    _need(is_text(tensor.name), f"{where}: a tensor's name", tensor.name, "text")
    where = f"{where}.{tensor.name}"
    _need(tensor.dtype in DTYPES, f"{where}.dtype", tensor.dtype, f"one of {', '.join(DTYPES)}")
    sides = all(_is_dimension(side) or (is_whole(side) and int(side) >= 0) for side in tensor.shape)
    _need(sides, f"{where}.shape", tensor.shape, "whole numbers, and names or multiples of them")


def _is_dimension(value: object) -> bool:
    try:
        return isinstance(value, str) and bool(dimension(value))
    except KeyError:
        return False


def _check_variant(where: str, variant: Variant, names: Iterable[str]) -> None:
    _need(is_text(variant.path), f"{where}.path", variant.path, "text")
    for name in ("opset", "nodes"):
        value = getattr(variant, name)
        _need(is_whole(value) and value >= 0, f"{where}.{name}", value, "a whole number")
    good = all(name in names and dtype in DTYPES for name, dtype in variant.dtypes.items())
    _need(good, f"{where}.dtypes", dict(variant.dtypes), f"dtypes by names of {', '.join(names)}")
    islands = variant.islands
    if islands is not None:
        _need(is_number(islands.largest), f"{where}.islands.largest", islands.largest, "a finite number")
        _need(all(map(is_text, islands.nodes)), f"{where}.islands.nodes", islands.nodes, "names of nodes")


def _check_golden(golden: Golden) -> None:
    texts = (golden.prompt, golden.negative_prompt, golden.solver)
    _need(all(isinstance(text, str) for text in texts), "golden's prompts and solver", texts, "text")
    for name in ("steps", "seed"):
        _need(is_whole(getattr(golden, name)), f"golden.{name}", getattr(golden, name), "a whole number")
    numbers = (golden.guidance, golden.mean, golden.std, *golden.first)
    _need(all(map(is_number, numbers)) and golden.std > 0, "golden's numbers", numbers, "finite, with std above 0")


def _need(good: object, field: str, value: object, needed: str) -> None:
    if not good:
        raise BundleError(f"manifest.json has {field} = {value!r}", needed=needed, fix=f"update latentrt, or {EXPORT}")
