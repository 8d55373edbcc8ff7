"""ControlNets and T2I-Adapters beside a base against diffusers: their networks, and whole pictures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from PIL import Image

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import (
    ADD_ONS,
    CONDITIONER,
    CONTROL,
    CONTROLNET_UNION,
    CONTROLNETS,
    FP16,
    FP32,
    HINT,
    ModelSpec,
)
from latentrt.engine import Engine
from latentrt.errors import RequestError, ScheduleError
from latentrt.model.control import BEFORE, FACTORS, PICTURE, SCALE, TYPE
from latentrt.model.predictor import inputs_of
from latentrt.runtime.base import Network, call
from latentrt.runtime.signature import shape_of
from latentrt_export.checkpoint.files import read_json
from latentrt_export.checkpoint.lone_control import ADAPTER, PART
from latentrt_export.checkpoint.lone_vae import CONFIG
from latentrt_export.verify.checks import Array, Check, difference, not_served, psnr, relative_l2, worst
from latentrt_export.verify.images import LATENTS_BOUND, PSNR_BOUND, run_engine, run_of
from latentrt_export.verify.networks import (
    LARGEST_BOUND,
    NETWORK_BOUND,
    drawn,
    half_check,
    plain_check,
    sizes_of,
)
from latentrt_export.verify.reference import PROMPTS, Run, Theirs, comparing, run_pipeline

NAME = "control"  # of the add-on in the engine
KIND = 1  # of maps, of a ControlNet Union
STRENGTH = 0.7  # of its residuals, at the network depth
TEXT, EDIT, INPAINT = "", "Img2Img", "Inpaint"  # of the names of diffusers' ControlNet pipelines
GUIDANCE, SEED = 3.0, 7


class Case(NamedTuple):
    """A run of both sides: what it is, the kind of pipeline, the control's settings and the request's."""

    what: str
    kind: str
    control: Mapping[str, Any]
    settings: Mapping[str, Any]


CASES = (
    Case("text", TEXT, {"scale": 0.8}, {}),
    Case("text, guess mode", TEXT, {"guess": True}, {}),
    Case("text, from 0.2 to 0.7", TEXT, {"scale": 1.2, "start": 0.2, "end": 0.7}, {}),
    Case("image", EDIT, {"scale": 0.8}, {"strength": 0.6}),
    Case("mask", INPAINT, {"scale": 0.8}, {"strength": 0.8}),
)
ADAPTED = (Case("text", TEXT, {"scale": 0.8}, {}),)
ADAPTED_XL = (Case("text, until 0.6", TEXT, {"scale": 0.8, "end": 0.6}, {}),)


def open_theirs(spec: ModelSpec, checkpoint: Path) -> Any:
    """Return an add-on's torch module as diffusers loads it, in float32."""
    folder = PART if spec.kind in CONTROLNETS else ADAPTER
    kind = str(read_json(checkpoint / folder / CONFIG)["_class_name"])
    with comparing(kind):
        module = getattr(diffusers, kind).from_pretrained(
            checkpoint / folder, torch_dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    return module.eval().requires_grad_(False)


def residual_checks(engine: Engine, bundle: Bundle, theirs: Any) -> Iterator[Check]:
    """Measure an add-on's graphs against its torch module, at the base's own size and, in guess mode, at an odd one.

    Args:
        engine: of the base; it gives the texts and runs the graphs.
        bundle: the add-on's.
        theirs: of `open_theirs`.
    """
    spec, latents = bundle.spec, engine.spec.latents
    names = [name for role in (HINT, CONDITIONER, CONTROL) for name in spec.named(role)]
    networks = {name: engine.backend.load(bundle, name) for name in names}
    outputs = [tensor.name for tensor in spec.networks[names[-1]].outputs]
    runs: list[dict[str, Array]] = []
    pairs: dict[str, list[tuple[Array, Array]]] = {output: [] for output in outputs}
    sizes = sizes_of(replace(latents, multiple=lcm(latents.multiple, spec.latents.multiple)))
    for guess, size in zip((False, spec.kind in CONTROLNETS), sizes, strict=True):
        feeds = _feeds(engine, spec, names, size, guess=guess)
        runs.append(_called(networks, feeds))
        with torch.no_grad(), comparing(type(theirs).__name__):
            expected = _residuals(theirs, {key: torch.from_numpy(array) for key, array in feeds.items()}, guess=guess)
        for output, tensor in zip(outputs, expected, strict=True):
            value = np.broadcast_to(tensor.numpy(), runs[-1][output].shape)  # of those that pool
            pairs[output].append((runs[-1][output], value))
    for output, values in pairs.items():
        what = f"{names[-1]}: {output}"
        l2, largest = worst([relative_l2(*pair) for pair in values]), worst([difference(*pair) for pair in values])
        yield Check("network", what, "relative L2, worst of 2 sizes", l2, NETWORK_BOUND)
        yield Check("network", what, "max abs, relative to the largest", largest, LARGEST_BOUND)
    for name, network in networks.items():
        network.close()
        variants, plain = spec.networks[name].variants, spec.networks[name].graph(FP32)
        if network.graph.path != plain.path:
            yield plain_check(bundle.path(plain.path), plain, name, runs)
        if FP16 in variants:
            half = spec.networks[name].graph(FP16)
            yield half_check(bundle.path(half.path), half, name, runs)


def _feeds(
    engine: Engine, spec: ModelSpec, names: list[str], size: tuple[int, int], *, guess: bool
) -> dict[str, Array]:
    """Return inputs of an add-on's networks that are called in turn; `size` is the latents' (height, width)."""
    read = inputs_of([spec.networks[name] for name in names])
    pooled, count = spec.conditional_only, len(spec.networks[names[-1]].outputs)
    factors = np.logspace(-1, 0, count) if guess and not pooled else np.ones(count)
    pixels = {"batch": len(PROMPTS), "height": size[0] * spec.latents.factor, "width": size[1] * spec.latents.factor}
    own = {
        PICTURE: np.random.default_rng(1).random(shape_of(read[PICTURE], pixels), np.float32),
        SCALE: np.full(len(PROMPTS), STRENGTH, np.float32),
        FACTORS: np.tile(factors.astype(np.float32), (len(PROMPTS), 1)),
    }
    if TYPE in read:
        own[TYPE] = np.tile(np.eye(int(read[TYPE].shape[1]), dtype=np.float32)[KIND], (len(PROMPTS), 1))
    rest = [tensor for name, tensor in read.items() if name not in own]
    feeds = {**drawn(engine, rest, PROMPTS, size), **own}
    return {name: np.zeros_like(array) if name.endswith(BEFORE) else array for name, array in feeds.items()}


def _called(networks: Mapping[str, Network], feeds: Mapping[str, Array]) -> dict[str, Array]:
    known = dict(feeds)
    for network in networks.values():
        known |= call(network, known)
    return known


def _residuals(theirs: Any, feeds: Mapping[str, torch.Tensor], *, guess: bool) -> tuple[torch.Tensor, ...]:
    """Return what diffusers' pipelines give to the UNet.

    A Union attends over the lanes of a call, as if they were what it reads together; here each is run alone.
    """
    if isinstance(theirs, diffusers.T2IAdapter):
        return tuple(one * STRENGTH for one in theirs(feeds[PICTURE]))
    union, lanes = isinstance(theirs, diffusers.ControlNetUnionModel), len(feeds[PICTURE])
    if union and lanes > 1:
        each = [
            _residuals(theirs, {key: one[i : i + 1] for key, one in feeds.items()}, guess=guess) for i in range(lanes)
        ]
        return tuple(map(torch.cat, zip(*each, strict=True)))
    types = {"control_type": feeds[TYPE], "control_type_idx": [KIND]} if union else {}
    added = {name: feeds[name] for name in ("text_embeds", "time_ids") if name in feeds}
    down, middle = theirs(
        feeds["sample"],
        feeds["timestep"],
        feeds.get("encoder_hidden_states"),
        [feeds[PICTURE]] if union else feeds[PICTURE],
        **types,
        conditioning_scale=STRENGTH,
        guess_mode=guess,
        added_cond_kwargs=added or None,
        return_dict=False,
    )
    return (*down, middle)


def controlled_checks(engine: Engine, spec: ModelSpec, pipelines: Theirs, theirs: Any, steps: int) -> Iterator[Check]:
    """Measure whole runs with an add-on against diffusers' pipelines for it.

    Args:
        engine: of the base, with the add-on as NAME.
        spec: the add-on's.
        pipelines: the base's.
        theirs: of `open_theirs`.
        steps: of each run.
    """
    cases = _cases(engine, spec)
    if not cases:
        note = f"diffusers has no pipeline of a {ADD_ONS[spec.kind]} for such a base"
        yield Check("image", engine.spec.id, "not compared", None, LATENTS_BOUND, note=note)
    for case in cases:
        run = _run(engine, spec, case, steps)
        try:
            ours, pictures = run_engine(engine, run)
        except (ScheduleError, RequestError) as error:
            yield not_served("image", case.what, LATENTS_BOUND, error)
            continue
        with comparing("pipeline"):
            pipe, told = _told(pipelines, case, run, theirs, guess=spec.conditional_only)
            latents, expected = run_pipeline(pipe, run, told)
        if case.kind != INPAINT or engine.model.reads_masks:  # else theirs put back what is kept after the step
            largest = worst([difference(a, b) for a, b in zip(ours, latents, strict=True)])
            yield Check("image", case.what, f"latents, worst of {len(latents)} steps", largest, LATENTS_BOUND)
        yield Check("image", case.what, "PSNR, dB", psnr(pictures, expected), PSNR_BOUND, at_least=True)


def _cases(engine: Engine, spec: ModelSpec) -> tuple[Case, ...]:
    """Return the runs that both sides can make.

    diffusers 0.42's pipelines of Unions, for SDXL alone, fail in guess mode with guidance: they give types for two
    lanes, and run one.
    """
    xl, draws = "time_ids" in engine.model.predictor.inputs, not engine.model.pictures
    if spec.kind not in CONTROLNETS:
        return (ADAPTED_XL if xl else ADAPTED) if draws else ()
    cases = CASES if draws else [case for case in CASES if case.kind == INPAINT and engine.model.reads_masks]
    if spec.kind == CONTROLNET_UNION:
        cases = [case for case in cases if xl and not case.control.get("guess")]
    return tuple(cases)


def _run(engine: Engine, spec: ModelSpec, case: Case, steps: int) -> Run:
    """Return a case as both sides get it, of a size that the add-on reads too."""
    union = spec.kind == CONTROLNET_UNION
    prompts = PROMPTS[:1] if union else PROMPTS  # diffusers' Unions mix the pictures of a batch
    run = run_of(engine, prompts, {"steps": steps, "solver": None, "seed": SEED, "guidance": GUIDANCE})
    step = spec.latents.step
    height, width = (max(run.settings[side] // step, 1) * step for side in ("height", "width"))
    picture = _map(height, width, grey=spec.networks[spec.named(HINT)[0]].inputs[0].shape[1] == 1)
    control = {**case.control, "image": picture} | ({"type": KIND} if union else {})
    settings = {**run.settings, **case.settings, "height": height, "width": width, "control": {NAME: control}}
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    image = (np.stack([columns, rows, rows * columns], axis=-1) * 255).astype(np.uint8)
    mask = (np.hypot(columns - 0.4, rows - 0.4) < 0.2).astype(np.uint8) * np.uint8(255)
    pictures = {TEXT: {}, EDIT: {"image": image}, INPAINT: {"image": image, "mask": mask}}[case.kind]
    return Run(prompts, settings, pictures)


def _map(height: int, width: int, *, grey: bool) -> Image.Image:
    """Return rings, as of edges, of this size."""
    rows, columns = np.mgrid[:height, :width] / max(height, width)
    rings = ((np.hypot(columns - 0.5, rows - 0.5) * 20 % 2) < 1).astype(np.uint8) * np.uint8(255)
    return Image.fromarray(rings).convert("L" if grey else "RGB")


def _told(pipelines: Theirs, case: Case, run: Run, theirs: Any, *, guess: bool) -> tuple[Any, dict[str, Any]]:
    """Return diffusers' pipeline for a case, and the arguments that it alone has.

    `guess` is of ControlNets that act on the prompt's lane alone: diffusers 0.42's inpainting pipeline of SDXL does not
    ask them, as its others do.
    """
    own = run.settings["control"][NAME]
    xl = "XL" if hasattr(pipelines.pipeline(), "text_encoder_2") else ""
    if isinstance(theirs, diffusers.T2IAdapter):
        pipe = pipelines.pipeline(kind=f"StableDiffusion{xl}AdapterPipeline", adapter=theirs)
        told = {"adapter_conditioning_scale": own["scale"], "image": [own["image"]] * len(run.prompts)}
        return pipe, told | ({"adapter_conditioning_factor": own["end"]} if "end" in own else {})
    union = isinstance(theirs, diffusers.ControlNetUnionModel)
    name = f"StableDiffusion{xl}ControlNet{'Union' if union else ''}{case.kind}Pipeline"
    told = {
        "controlnet_conditioning_scale": own.get("scale", 1.0),
        "control_guidance_start": own.get("start", 0.0),
        "control_guidance_end": own.get("end", 1.0),
        "guess_mode": guess or own.get("guess", False),
        "control_image" if union or case.kind != TEXT else "image": own["image"],
    }
    return pipelines.pipeline(kind=name, controlnet=theirs), told | ({"control_mode": KIND} if union else {})
