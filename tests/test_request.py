"""Requests are checked where they are made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.errors import RequestError
from latentrt.request import Request


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
