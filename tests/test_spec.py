"""Requests are checked where they are made; manifests are read back as they were written."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import BundleError, RequestError
from engine.spec import Golden, GraphSpec, LatentSpec, ModelSpec, Request, TensorSpec

MODEL = ModelSpec(
    id="tiny",
    revision=None,
    license="mit",
    family="sd",
    latents=LatentSpec(channels=4, factor=8, scale=0.18215, shift=0.0, height=8, width=8),
    tokenizers=("tokenizer",),
    text_encoders=("text_encoder",),
    schedule="scheduler/scheduler_config.json",
    graphs={
        "unet": GraphSpec(
            "unet/model.onnx", 23, 10, (TensorSpec("sample", "float32", ("batch", 4, "height", "width")),), ()
        )
    },
    golden=(Golden("a", "", "ddim", 4, 7, 3.0, 0.1, 1.0, (0.5, 0.25)),),
)


def test_model_spec_survives_json() -> None:
    assert ModelSpec.from_dict(json.loads(json.dumps(MODEL.to_dict()))) == MODEL


@pytest.mark.parametrize(
    "change",
    [
        {"family": "flux"},
        {"latents": {"channels": 4}},
        {"graphs": {"unet": {"path": "x"}}},
        {"graphs": []},
        {"surprise": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_manifest_of_another_kind_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(BundleError, match="manifest"):
        ModelSpec.from_dict({**MODEL.to_dict(), **change})


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
        ("guidance", float("nan")),
        ("guidance", float("inf")),
        ("guidance", -1.0),
        ("guidance", "3"),
        ("guidance_rescale", 1.5),
        ("height", 0),
        ("guidance_interval", (0.5, 0.2)),
        ("guidance_interval", (-0.1, 1.0)),
    ],
)
def test_a_request_out_of_range_names_the_field(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=name):
        Request(prompt="a", **{name: value})


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
