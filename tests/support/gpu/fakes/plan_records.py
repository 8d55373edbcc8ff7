"""Keys and records of plans that need no bundle and no TensorRT, for the tests of the folder that holds them."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from latentrt.runtime.tensorrt.plans import PlanStore
from latentrt.runtime.tensorrt.record import PlanKey, PlanRecord, Profile

KEY = PlanKey(
    network="unet",
    graph="a" * 64,
    weights="b" * 64,
    precision="fp16",
    library="tensorrt",
    version="10.13.3.9",
    gpu="NVIDIA H200",
    compute_capability="9.0",
    driver="13.0",
)
SQUARE = Profile({"batch": (2, 2, 8), "height": (64, 64, 96), "width": (64, 64, 96)})
SMALL = Profile({"batch": (1, 1, 1), "height": (32, 32, 32), "width": (32, 32, 32)})
PLAN = bytes(range(256)) * 4
SIZES = {"batch": 2, "height": 64, "width": 64}


def record(key: PlanKey = KEY, plan: bytes = PLAN, **more: Any) -> PlanRecord:
    """Return the record of a plan, which serves SQUARE unless the key has profiles."""
    key = key if key.profiles else replace(key, profiles=(SQUARE,))
    return PlanRecord(key, hashlib.sha256(plan).hexdigest(), len(plan), **more)


def find(store: PlanStore, key: PlanKey = KEY, sizes: dict[str, int] = SIZES) -> PlanRecord:
    """Return the record of the plan that serves a key best with these sizes."""
    return store.choose(store.fitting(key), sizes)
