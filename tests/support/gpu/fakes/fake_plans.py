"""Plans of the fake TensorRT, placed as `latentrt build` places real ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.cuda.gpu import Gpu
from latentrt.runtime.tensorrt.library import wanted_key
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import STRIPPED, PlanRecord, Profile, Range, Weight
from latentrt_export.plans.plan_graph import weights_of
from latentrt_export.plans.plan_shapes import profiles_of, shapes_of
from latentrt_export.plans.wanted import bundles_of, networks_of
from tests.support.gpu.fakes.fake_tensorrt import MAGIC, FakeTensorRt


def fake_plan(
    fake: FakeTensorRt,
    onnx_path: Path,
    graph: GraphSpec,
    profiles: Sequence[Profile],
    *,
    stripped: bool = False,
    refittable: bool = False,
    merged: Sequence[Sequence[str]] = (),
    memory: int = 64,
) -> bytes:
    """Return a plan that runs an ONNX graph.

    Args:
        merged: groups of weights that can only be refitted together.
        memory: bytes of working memory for each number of the inputs.
    """
    signature = asdict(graph)
    plan = {
        "magic": MAGIC,
        "version": fake.__version__,
        "onnx": str(onnx_path),
        "inputs": signature["inputs"],
        "outputs": signature["outputs"],
        "profiles": [dict(profile.ranges) for profile in profiles],
        "stripped": stripped,
        "refittable": refittable or stripped,
        "merged": merged,
        "memory": memory,
    }
    return json.dumps(plan).encode()


def put_plan(
    bundle: Bundle,
    network: str,
    fake: FakeTensorRt,
    gpu: Gpu,
    *ranges: Mapping[str, Range],
    precision: str = "fp32",
    folder: Path | None = None,
    options: Collection[str] = (),
    refit: Mapping[str, Weight] | None = None,
    **more: Any,
) -> PlanRecord:
    """Put a fake plan of a bundle's network into its store, as `latentrt build` does with a real one.

    `ranges` are the profiles' (least, best, most) of the graph's symbolic dimensions.
    """
    graph = bundle.spec.graph(network, precision)
    profiles = tuple(map(Profile, ranges))
    more = {"stripped": STRIPPED in options, "refittable": "refittable" in options, **more}
    plan = fake_plan(fake, bundle.path(graph.path), graph, profiles, **more)
    return put_bytes(bundle, network, fake, gpu, plan, profiles, precision, folder, options, refit)


def put_plans(
    folder: Path,
    fake: FakeTensorRt,
    gpu: Gpu,
    shapes: Mapping[str, str],
    *,
    networks: Sequence[str] = (),
    options: Sequence[str] = (),
    precision: str = "fp16",
    plans: Path | None = None,
) -> list[PlanRecord]:
    """Put fake plans of a bundle's networks, and of those of its add-ons, as `latentrt build` does.

    Args:
        shapes: as of `shapes_of`.
        networks: names; none means all.
        options: of the command without their dashes: "refittable", "controlnet=NAME=BUNDLE", "lora-rank=8".
    """
    told = [option.partition("=")[::2] for option in options]
    more = dict(told)
    bundles = bundles_of(folder, [pair for name, pair in told if name == "controlnet"], loras="lora-rank" in more)
    asked = shapes_of(bundles[0].spec, {**shapes, **({"rank": more["lora-rank"]} if "lora-rank" in more else {})})
    own = ["-".join(filter(None, pair)) for pair in told if pair[0] not in ("controlnet", "lora-rank")]
    records = []
    for bundle, names in networks_of(bundles, networks):
        for name in names:
            graph = bundle.spec.graph(name, precision)
            settable = {"stripped", "refittable"} & set(own)
            refit = weights_of(ir.load(bundle.path(graph.path)), graph) if settable else {}
            ranges = [profile.ranges for profile in profiles_of(bundle.spec, name, asked)]
            how: dict[str, Any] = {"precision": precision, "options": own, "refit": refit, "folder": plans}
            records.append(put_plan(bundle, name, fake, gpu, *ranges, **how))
    return records


def put_bytes(
    bundle: Bundle,
    network: str,
    fake: FakeTensorRt,
    gpu: Gpu,
    plan: bytes,
    profiles: Sequence[Profile],
    precision: str = "fp32",
    folder: Path | None = None,
    options: Collection[str] = (),
    refit: Mapping[str, Weight] | None = None,
) -> PlanRecord:
    """Put any bytes as a network's plan."""
    key = wanted_key(bundle, network, precision, fake.library, gpu)
    key = replace(key, options=tuple(options), profiles=tuple(profiles))
    record = PlanRecord(key, hashlib.sha256(plan).hexdigest(), len(plan), dict(refit or {}))
    PlanStore(bundle, folder).put(record, plan)
    return record
