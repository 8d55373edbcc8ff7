"""Plans of the fake TensorRT, placed as `latentrt build` places real ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from latentrt.bundle.bundle import Bundle
from latentrt.bundle.spec import GraphSpec
from latentrt.cuda.gpu import Gpu
from latentrt.runtime.tensorrt.library import wanted_key
from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import STRIPPED, PlanRecord, Profile, Range, Weight
from tests.support.gpu.fake_tensorrt import MAGIC, FakeTensorRt


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
