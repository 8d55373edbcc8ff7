"""Keys, profiles and records: which plans may serve what, and that a record is read back as it was written."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.bundle.spec import TensorSpec
from latentrt.runtime.tensorrt.record import (
    REFITTABLE,
    STRIPPED,
    VERSION_COMPATIBLE,
    PlanKey,
    PlanRecord,
    Profile,
    Weight,
    drawn_by,
)
from tests.support.gpu.fakes.plan_records import KEY, SIZES, SMALL, SQUARE, record

# Keys


@pytest.mark.parametrize("field", [f.name for f in fields(PlanKey)])
def test_every_field_is_part_of_the_name(field: str) -> None:
    other = {"options": (STRIPPED,), "profiles": (SMALL,)}.get(field, "other")
    assert replace(KEY, **{field: other}).name != KEY.name


def test_the_order_in_a_profile_is_not_part_of_the_name() -> None:
    reordered = Profile(dict(reversed(SQUARE.ranges.items())))
    assert replace(KEY, profiles=(reordered,)).name == replace(KEY, profiles=(SQUARE,)).name


def test_a_name_says_the_network() -> None:
    assert KEY.name.startswith("unet-")
    assert len(KEY.name) == len("unet-") + 16
    assert record().name == record().key.name


def test_no_plan_serves_another_version() -> None:
    for options in ((), (VERSION_COMPATIBLE,)):
        found = replace(KEY, version="10.9.0.34", options=options).mismatches(replace(KEY, version="10.13.3.9"))
        assert found == [("version", "10.9.0.34", "10.13.3.9")]


def test_the_lean_runtime_takes_only_version_compatible_plans() -> None:
    lean = replace(KEY, library="tensorrt-lean")
    assert not replace(KEY, options=(VERSION_COMPATIBLE,)).mismatches(lean)
    assert KEY.mismatches(lean) == [("library", "tensorrt", "tensorrt-lean")]
    rtx = replace(KEY, library="tensorrt-rtx", options=(VERSION_COMPATIBLE,))
    assert rtx.mismatches(lean) == [("library", "tensorrt-rtx", "tensorrt-lean")]
    assert replace(KEY, options=(VERSION_COMPATIBLE,)).mismatches(rtx)


def test_only_a_refittable_plan_serves_other_weights() -> None:
    wanted = replace(KEY, weights="c" * 64)
    assert not replace(KEY, options=(STRIPPED, REFITTABLE)).mismatches(wanted)
    assert not replace(KEY, options=(REFITTABLE,)).mismatches(wanted)
    stripped = replace(KEY, options=(STRIPPED,))  # refitted with other weights, it computes anything
    assert stripped.mismatches(wanted) == [("weights", "b" * 64, "c" * 64)]
    assert replace(KEY, options=(REFITTABLE,)).mismatches(replace(wanted, graph="d" * 64))


# Profiles


def test_profiles_give_shapes_and_say_what_they_cover() -> None:
    sample = TensorSpec("sample", "float16", ("batch", 4, "height", "width"))
    assert SQUARE.shapes(sample) == ((2, 4, 64, 64), (2, 4, 64, 64), (8, 4, 96, 96))
    assert SQUARE.covers({"batch": 8})
    assert not SQUARE.covers({"batch": 9})
    both = record(replace(KEY, profiles=(SMALL, SQUARE)))
    assert both.profile(SIZES) == 1
    assert both.profile({}) == 0
    assert both.profile({**SIZES, "height": 97}) == -1


def test_what_is_drawn_is_what_unet_and_vae_both_serve() -> None:
    vae = Profile({"batch": (1, 1, 4), "height": (16, 16, 80), "width": (72, 80, 96)})
    assert drawn_by([([SQUARE, SMALL], 2), ([vae], 1)]) == (Profile({"height": (64, 64, 80), "width": (72, 72, 96)}),)
    both = drawn_by([([SQUARE], 2), ([vae], 1)])
    assert drawn_by([([SQUARE, SQUARE], 2), ([SQUARE, vae], 1)]) == both  # no VAE of one picture
    assert drawn_by([([SQUARE], 2), ([SMALL], 1)]) == ()
    assert drawn_by([([SQUARE], 9), ([vae], 1)]) == ()
    assert drawn_by([([SQUARE], 2), ([vae], 1), ([SMALL], 2)]) == ()  # a ControlNet of one lane
    assert drawn_by([([SQUARE], 2)]) == (Profile({side: SQUARE.ranges[side] for side in ("height", "width")}),)


# Records

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), max_size=20)
whole = st.integers(0, 2**40)
ranges = st.lists(whole, min_size=3, max_size=3).map(lambda three: tuple(sorted(three)))
weights = st.builds(Weight, file=names, offset=whole, bytes=whole, stored=names, dtype=names)
json_values = st.recursive(
    st.none() | st.booleans() | whole | st.floats(allow_nan=False) | names,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=5,
)
keys = st.builds(
    PlanKey,
    **dict.fromkeys(("graph", "weights", "precision", "library", "version", "gpu", "driver"), names),
    network=names,
    compute_capability=names,
    options=st.lists(st.sampled_from([STRIPPED, REFITTABLE]), unique=True).map(tuple),
    profiles=st.lists(st.builds(Profile, st.dictionaries(names, ranges, max_size=3)), max_size=2).map(tuple),
)
records = st.builds(
    PlanRecord,
    keys,
    sha256=names,
    bytes=whole,
    refit=st.dictionaries(names, weights, max_size=3),
    made=st.dictionaries(names, json_values, max_size=3),
)


@settings(max_examples=50, deadline=None)
@given(records)
def test_records_come_back_as_they_were(record: PlanRecord) -> None:
    found = PlanRecord.from_json(record.to_json())
    assert found == record
    assert found.name == record.name


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", '{"schema": 1}', '{"schema": 1, "key": 3}', "[" * 100_000, "\xff"]
)
def test_what_is_no_record_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"Expecting|not the record of a plan"):
        PlanRecord.from_json(text)


def test_another_schema_is_refused() -> None:
    data: dict[str, Any] = json.loads(record().to_json())
    with pytest.raises(ValueError, match="schema 0, not 1"):
        PlanRecord.from_json(json.dumps({**data, "schema": 0}))
