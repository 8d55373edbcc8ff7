"""The budget by itself: lanes of a call, what fits, tiles."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.serve.core.rules.budget import GROWTH, Budget, Footprint

OWN, MIB = (4, 16, 16), 2**20
KNOWN = {(4, 64, 64): Footprint(50 * MIB, 150 * MIB)}


def test_larger_pictures_run_in_smaller_calls() -> None:
    budget = Budget(16, OWN)
    assert [budget.cap((4, side, side)) for side in (8, 16, 32, 64, 256)] == [16, 16, 4, 1, 1]
    assert [budget.lanes_of_call((4, side, side)) for side in (8, 16, 32, 64, 256)] == [64, 16, 4, 1, 1]
    assert Budget(16, OWN, fixed=True).cap((4, 64, 64)) == 16  # idle lanes are computed too


def test_memory_bounds_the_lanes_of_a_call() -> None:
    budget = Budget(1024, OWN, 400 * MIB, KNOWN)
    assert budget.lanes_of_call((4, 64, 64)) == 4
    assert budget.lanes_of_call((4, 32, 32)) == 16


def test_loras_take_as_much_at_every_size() -> None:
    budget = Budget(1024, OWN, 400 * MIB, KNOWN, adapters=50 * MIB)
    assert budget.lanes_of_call((4, 64, 64)) == 2
    assert budget.lanes_of_call((4, 32, 32)) == 3  # of 62.5 MiB, not 12.5
    assert Budget(1024, OWN, 400 * MIB, adapters=50 * MIB).lanes_of_call((4, 32, 32)) == 4
    assert Budget(16, OWN, 200 * MIB, {(4, 64, 64): Footprint(50 * MIB, 0)}, adapters=50 * MIB).largest(10**6) == 64**2


def test_what_was_not_measured_grows_faster_than_its_area() -> None:
    exactly = 2 * 50 * MIB * 4**GROWTH
    assert Budget(16, OWN, math.ceil(exactly), {(4, 64, 64): Footprint(50 * MIB, 0)}).largest(10**6) == 128 * 128
    assert Budget(16, OWN, 10, KNOWN).largest(10**6) == 16 * 16  # the model's own always fits
    assert Budget(16, OWN, None, KNOWN).largest(10**6) == 10**6
    assert Budget(16, OWN, 10 * MIB, {}).largest(10**6) == 10**6
    gpu = Budget(16, OWN, 500 * MIB, {(4, 64, 64): Footprint(50 * MIB, 0)}, fixed=True)
    assert gpu.largest(10**6) == 10 * 64 * 64


def test_tiles_are_as_large_as_can_be_decoded() -> None:
    small = {(4, 64, 64): Footprint(1, 150 * MIB)}
    assert Budget(16, OWN, 300 * MIB, small).tiled(64 * 64).tile is None
    tiled = Budget(16, OWN, 299 * MIB, small).tiled(64 * 64)
    assert tiled.tile == 56
    assert tiled.fits(10**6)
    assert Budget(16, OWN, 1, small).tiled(64 * 64).tile == 16


@settings(max_examples=50, deadline=None)
@given(memory=st.integers(1, 2**34), lane=st.integers(0, 2**30), decode=st.integers(0, 2**30))
def test_the_largest_fits_and_no_larger_one(memory: int, lane: int, decode: int) -> None:
    budget = Budget(16, OWN, memory, {(4, 64, 64): Footprint(lane, decode)})
    largest = budget.largest(2**18)
    assert budget.fits(largest)
    assert largest == 2**18 or not budget.fits(largest + 1)


@pytest.mark.parametrize("area", [1, 256, 257])
def test_the_models_own_size_always_fits(area: int) -> None:
    assert Budget(16, OWN, 1, KNOWN).fits(area) is (area <= 256)
