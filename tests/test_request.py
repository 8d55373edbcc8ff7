"""Requests are checked where they are made."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.errors import RequestError
from latentrt.request import Request
from latentrt.run.facts import facts_of
from latentrt.values import plain


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", -3),
        ("steps", 1.5),
        ("steps", True),
        ("count", 0),
        ("seed", -1),
        ("seed", 2**64),
        ("subseed", -1),
        ("subseed", "x"),
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", -1.0),
        ("guidance", "3"),
        ("guidance_rescale", 1.5),
        ("height", 0),
        ("guidance_interval", (0.5, 0.2)),
        ("guidance_interval", (-0.1, 1.0)),
        ("guidance_interval", 0.5),
        ("guidance_interval", (0.0, 0.5, 1.0)),
        ("guidance_interval", ("a", "b")),
        ("guidance_interval", "01"),
        ("guidance", 10**400),
        ("noise", None),
        ("noise", 3),
        ("solver", 3),
        ("negative_prompt", 3),
        ("class_label", -1),
        ("class_label", 1.5),
        ("prompt_syntax", "comfy"),
        ("clip_skip", -1),
        ("clip_skip", 0.5),
        ("embeddings", ["toy.safetensors"]),
        ("embeddings", {"<toy>": 3}),
        ("noise_level", 0.5),
        ("aesthetic_score", -1),
        ("prompt", 3),
        ("pictures", {"photo": np.zeros((8, 8, 3), np.uint8)}),
        ("options", [1]),
        ("options", {1: 2}),
        *(("options", {key: 1}) for key in ("prompt", "steps", "schedule", "scheduler", "options")),
    ],
)
def test_a_request_out_of_range_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match={"options": "option", "pictures": "picture"}.get(name, name)):
        Request(**{"prompt": "a", name: value})


def test_the_last_seed_is_in_range_too() -> None:
    assert Request(prompt="a", seed=2**64 - 3, count=3).count == 3
    with pytest.raises(RequestError, match="the last picture's seed"):
        Request(prompt="a", seed=2**64 - 3, count=4)


@given(
    steps=st.integers(1, 1000),
    seed=st.integers(0, 2**64 - 1),
    guidance=st.floats(0, 30),
    start=st.floats(0, 0.5),
    end=st.floats(0.5, 1),
)
def test_a_request_in_range_keeps_its_values(steps: int, seed: int, guidance: float, start: float, end: float) -> None:
    request = Request(prompt="a", steps=steps, seed=seed, guidance=guidance, guidance_interval=(start, end))
    assert (request.steps, request.seed, request.guidance) == (steps, seed, guidance)


NUMPY: dict[str, Any] = {
    "prompt": np.str_("a"),
    "negative_prompt": np.str_("b"),
    "steps": np.uint8(4),
    "solver": np.str_("ddim"),
    "seed": np.uint64(2**64 - 2),
    "guidance": np.float32(3.5),
    "guidance_rescale": np.float16(0.5),
    "guidance_interval": np.array([0, 0.5], np.float32),
    "cache_interval": np.int16(1),
    "height": np.int32(64),
    "width": np.int64(64),
    "count": np.int8(2),
    "class_label": np.int64(3),
    "image_guidance": np.float32(1.5),
    "noise_level": np.int16(20),
    "noise": np.str_("torch-cpu"),
    "strength": np.float64(0.5),
    "mask_blur": np.float32(4.5),
    "mask_crop": np.int16(32),
    "mask_fill": np.str_("noise"),
    "mask_keeps": np.True_,
    "seed_delta": np.uint32(31337),
    "subseed": np.uint64(9),
    "subseed_strength": np.float32(0.5),
    "resize": np.str_("crop"),
    "hires_scale": np.float32(1.5),
    "hires_steps": np.int8(3),
    "hires_strength": np.float16(0.5),
    "handoff": np.float64(0.75),
    "prompt_syntax": np.str_("a1111"),
    "clip_skip": np.int8(1),
    "aesthetic_score": np.float32(6.5),
    "negative_aesthetic_score": np.float32(2.5),
    "options": {"eta": np.float32(0.5), "use_karras_sigmas": np.False_, "disable_corrector": np.array([0, 1])},
}


def test_numpys_values_are_values() -> None:
    request = Request(**NUMPY)
    assert set(NUMPY) == set(Request.__dataclass_fields__) - {"pictures", "control", "ip_adapter", "embeddings", "lora"}
    wanted = {name: plain(value) for name, value in NUMPY.items()}
    wanted["options"] = {"eta": 0.5, "use_karras_sigmas": False, "disable_corrector": [0, 1]}
    for name, value in wanted.items():
        made = getattr(request, name)
        assert (made, type(made)) == (value, type(value)), name
    assert Request(lora={"a": np.float32(0.5), "b": np.array([1, 0])}).lora == {"a": (0.5, 0.5), "b": (1.0, 0.0)}
    json.dumps(facts_of(request, "ddim", request.seed, 0, (64, 64), "model"), allow_nan=False)


@pytest.mark.parametrize(
    "value", [np.float32("nan"), np.float32("inf"), np.True_, np.array([1.0, 2.0]), np.float32(-1)]
)
def test_numpys_values_are_checked(value: Any) -> None:
    with pytest.raises(RequestError, match="guidance is"):
        Request(prompt="a", guidance=value)
