"""Symbolic sizes are checked as they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentrt.bundle.spec import GraphSpec, TensorSpec, dimension
from latentrt.errors import NetworkError
from latentrt.runtime.signature import check_arrays, check_feeds, shape_of, sizes_of, symbols

LATENTS = TensorSpec("sample", "float32", ("batch", 4, "height", "width"))
HINT = TensorSpec("hint", "float32", ("batch", 3, "8*height", "8*width"))
HALVED = TensorSpec("out", "float32", ("batch", 4, "(height//2)", "2*(width//4)"))


def graph(*inputs: TensorSpec) -> GraphSpec:
    return GraphSpec("g.onnx", 23, 1, inputs, (HALVED,))


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize("order", [(LATENTS, HINT), (HINT, LATENTS)], ids=["latents first", "hint first"])
def test_a_multiple_of_a_size_is_a_multiple(order: tuple[TensorSpec, ...]) -> None:
    good = {"sample": zeros(2, 4, 16, 24), "hint": zeros(2, 3, 128, 192)}
    assert check_feeds(graph(*order), good) == {"batch": 2, "height": 16, "width": 24}
    for shape in [(2, 3, 77, 5), (2, 3, 128, 193), (2, 3, 192, 128), (1, 3, 128, 192)]:
        with pytest.raises(NetworkError, match=r"was fed .* of float32 .* with .*height 16, width 24"):
            check_feeds(graph(*order), {**good, "hint": zeros(*shape)})


def test_a_multiple_alone_tells_the_size() -> None:
    assert check_feeds(graph(HINT), {"hint": zeros(1, 3, 64, 80)}) == {"batch": 1, "height": 8, "width": 10}
    with pytest.raises(NetworkError, match="hint of float32"):
        check_feeds(graph(HINT), {"hint": zeros(1, 3, 65, 80)})


def test_outputs_have_the_sizes_that_the_inputs_tell() -> None:
    good = {"sample": zeros(1, 4, 16, 24), "out": zeros(1, 4, 8, 12)}
    assert check_arrays(graph(LATENTS), good) == {"batch": 1, "height": 16, "width": 24}
    with pytest.raises(NetworkError, match="out of float32"):
        check_arrays(graph(LATENTS), {**good, "out": zeros(1, 4, 8, 11)})


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({}, r"inputs \[\]. Needed: inputs \['sample'\]"),
        ({"sample": zeros(1, 4, 8, 8), "more": zeros(1)}, "inputs"),
        ({"sample": np.zeros((1, 4, 8, 8))}, "sample of float64"),
        ({"sample": zeros(1, 3, 8, 8)}, r"sample of float32 \(1, 3, 8, 8\)"),
        ({"sample": zeros(1, 4, 8)}, r"sample of float32 \(1, 4, 8\)"),
    ],
)
def test_what_does_not_fit_is_named(feeds: dict[str, Any], words: str) -> None:
    with pytest.raises(NetworkError, match=words):
        check_feeds(graph(LATENTS), feeds)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 999))
def test_a_dimension_is_what_it_says(factor: int, divisor: int, size: int) -> None:
    assert dimension(f"{factor}*(height//{divisor})").of(size) == factor * size // divisor
    assert dimension("height").of(size) == size
    assert dimension(f"((height+{divisor - 1})//{divisor})").of(size) == -(-size // divisor)


@pytest.mark.parametrize("side", ["height + 1", "8*", "(a*b)", "", "4*(2*height)", "((height+)//2)", "(height+1"])
def test_other_forms_are_none(side: str) -> None:
    with pytest.raises(KeyError):
        dimension(side)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 4))
def test_sizes_and_shapes_belong_together(height: int, width: int, batch: int) -> None:
    sizes = {"batch": batch, "height": height, "width": width}
    shapes = {tensor.name: shape_of(tensor, sizes) for tensor in (HINT, LATENTS)}
    assert sizes_of((HINT, LATENTS), shapes) == sizes
    assert symbols((HINT, HALVED)) == ["batch", "height", "width"]
