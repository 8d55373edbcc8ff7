"""The measured curve: what it predicts, how many lanes pay, where it is kept."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentrt.command import bench
from latentrt.engine import Engine
from latentrt.errors import BundleError, OutputError
from latentrt.serve.core.measured import curve as curves
from latentrt.serve.core.measured.curve import Curve
from latentrt.serve.core.rules.budget import Footprint
from tests.support.serve.fake_engine import SHAPE, SMALL

# The embedded model on one core: seconds of a UNet call by its lanes.
MEASURED = {1: 0.0071, 2: 0.0117, 4: 0.0196, 8: 0.0371, 16: 0.0680, 32: 0.1252}

points = st.dictionaries(st.integers(1, 64), st.floats(1e-4, 10), min_size=1, max_size=6)


@settings(max_examples=100, deadline=None)
@given(points=points, lanes=st.integers(1, 128))
def test_seconds_are_those_measured_and_lie_between_their_neighbours(points: dict[int, float], lanes: int) -> None:
    curve = Curve({SHAPE: points})
    for known, seconds in points.items():
        assert curve.seconds(SHAPE, known) == pytest.approx(seconds)
    low = max((known for known in points if known <= lanes), default=min(points))
    high = min((known for known in points if known >= lanes), default=max(points))
    ends = sorted((points[low], points[high]))
    if lanes <= max(points):
        assert ends[0] * 0.999 <= curve.seconds(SHAPE, lanes) <= ends[1] * 1.001  # type: ignore[operator]
    else:
        assert curve.seconds(SHAPE, lanes) == pytest.approx(points[high] * lanes / high)


def test_an_unknown_size_counts_by_its_pixels() -> None:
    curve = Curve({SHAPE: {2: 1.0}}, {SHAPE: 0.5})
    assert curve.seconds(SMALL, 2) == pytest.approx(0.25)
    assert curve.decoding(SMALL) == pytest.approx(0.125)
    assert (Curve().seconds(SHAPE, 2), Curve().decoding(SHAPE)) == (None, 0.0)


@pytest.mark.parametrize(
    ("seconds", "most", "cap"),
    [
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 16, 16),  # free, as on a GPU that is not full
        ({2: 1.0, 4: 1.0, 8: 1.0, 16: 1.0}, 6, 6),  # never more than there are
        ({2: 1.0, 4: 2.0, 8: 4.0}, 16, 2),  # nothing gained
        ({2: 1.0, 4: 1.2, 8: 2.5, 16: 5.0}, 16, 4),  # full at four
        ({2: 1.0, 4: 1.9, 8: 3.7, 16: 7.2}, 16, 2),  # one that is hardly faster
        ({2: 1.0, 4: 1.7, 8: 3.5, 16: 5.6}, 16, 16),  # a bad measurement in between ends nothing
        ({2: 1.0}, 1, 1),
        ({2: 1.0}, 16, 2),  # never more than were measured
        ({}, 16, 16),  # nothing is known
    ],
    ids=str,
)
def test_the_cap_is_the_most_lanes_that_pay(seconds: dict[int, float], most: int, cap: int) -> None:
    assert Curve({SHAPE: seconds} if seconds else {}).cap(SHAPE, most) == cap


def test_the_cap_of_the_embedded_model_on_a_core() -> None:
    assert Curve({SHAPE: MEASURED}).cap(SHAPE, 32) == 16


@settings(max_examples=100, deadline=None)
@given(points=points, most=st.integers(1, 64), side=st.sampled_from([4, 8, 16, 32]))
def test_the_cap_is_always_usable(points: dict[int, float], most: int, side: int) -> None:
    cap = Curve({SHAPE: points}).cap((4, side, side), most)
    assert min(2, most) <= cap <= most


def test_a_server_learns_and_what_was_saved_stays() -> None:
    saved = Curve({SHAPE: {2: 1.0}})
    own = deepcopy(saved)
    for _ in range(100):
        own.learn(SHAPE, 2, 3.0)
        own.learn(SMALL, 4, 5.0)
    assert own.seconds(SHAPE, 2) == pytest.approx(3.0, rel=1e-3)
    assert own.seconds(SMALL, 4) == 5.0
    assert saved.ticks == {SHAPE: {2: 1.0}}


# ---- Files


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def elsewhere(engine: Engine, home: Path) -> Engine:
    """The fake engine, as if its bundle lay in a folder of the test's."""
    root = home / "bundle"
    root.mkdir()
    (root / "manifest.json").write_bytes((engine.bundle.root / "manifest.json").read_bytes())
    engine.bundle = replace(engine.bundle, root=root)
    return engine


def test_a_curve_is_kept_with_the_bundle(elsewhere: Engine) -> None:
    assert curves.load(elsewhere) is None
    curve = Curve({SHAPE: MEASURED, SMALL: {2: 0.5}}, {SHAPE: 0.05}, {SHAPE: Footprint(1, 0)})
    path = curves.save(curve, elsewhere)
    assert path.is_relative_to(elsewhere.bundle.root)
    assert curves.load(elsewhere) == curve
    assert curves.save(Curve({SHAPE: {2: 1.0}}), elsewhere) == path
    assert curves.load(elsewhere) == Curve({SHAPE: {2: 1.0}})
    assert list(path.parent.iterdir()) == [path]


def test_a_curve_of_an_older_version_has_no_memory(elsewhere: Engine) -> None:
    path = curves.paths(elsewhere)[0]
    path.parent.mkdir()
    path.write_text('{"schema": 1, "ticks": [], "decode": []}')
    assert curves.load(elsewhere) == Curve()


def test_where_the_bundle_cannot_be_written_it_is_kept_in_the_users_cache(elsewhere: Engine, home: Path) -> None:
    (elsewhere.bundle.root / "curves").write_text("in the way, also of those who may write everywhere")
    path = curves.save(Curve({SHAPE: MEASURED}), elsewhere)
    assert path.is_relative_to(home / "cache" / "latentrt" / "curves")
    (elsewhere.bundle.root / "curves").unlink()
    assert curves.load(elsewhere) == Curve({SHAPE: MEASURED})


def test_where_nothing_can_be_written_it_says_so(elsewhere: Engine, home: Path) -> None:
    (elsewhere.bundle.root / "curves").write_text("in the way")
    (home / "cache").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        curves.save(Curve(), elsewhere)


def test_another_backend_precision_or_model_has_its_own_curve(elsewhere: Engine, home: Path) -> None:
    seen = {curves.paths(elsewhere)}
    elsewhere.backend.precision = "fp16"
    seen.add(curves.paths(elsewhere))
    elsewhere.backend.name = "other"
    seen.add(curves.paths(elsewhere))
    (elsewhere.bundle.root / "manifest.json").write_text("{}")
    seen.add(curves.paths(elsewhere))
    assert len(seen) == 4


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"\xff\xff",
        b"[]",
        b"{}",
        b'{"schema": 2, "ticks": [], "decode": []}',
        b'{"schema": 1, "ticks": [{"shape": [4, 16], "lanes": 2, "seconds": 1.0}], "decode": []}',
        b'{"schema": 1, "ticks": [{"shape": [4, 16, 16], "lanes": 0, "seconds": 1.0}], "decode": []}',
        b'{"schema": 1, "ticks": [{"shape": [4, 16, 16], "lanes": 2, "seconds": NaN}], "decode": []}',
        b'{"schema": 1, "ticks": [], "decode": [{"shape": [4, 16, 16], "seconds": "1"}]}',
        b'{"schema": 1, "ticks": [], "decode": [], "memory": [{"shape": [4, 16, 16], "lane": -1, "decode": 0}]}',
    ],
    ids=str,
)
def test_a_damaged_file_is_refused_by_name(elsewhere: Engine, damage: bytes) -> None:
    path = curves.paths(elsewhere)[0]
    path.parent.mkdir()
    path.write_bytes(damage)
    with pytest.raises(BundleError, match=path.name) as refused:
        curves.load(elsewhere)
    assert "--save" in refused.value.fix


def test_bench_measures_a_curve(elsewhere: Engine) -> None:
    results = bench.measure(elsewhere, [1, 2], steps=1, repeats=1)
    curve = curves.of_bench(elsewhere, results)
    assert {shape: sorted(lanes) for shape, lanes in curve.ticks.items()} == {SHAPE: [2, 4]}
    assert all(0 < seconds < math.inf for seconds in (*curve.ticks[SHAPE].values(), curve.decode[SHAPE]))
    about: dict[str, Any] = json.loads(curves.save(curve, elsewhere).read_bytes())
    assert (about["backend"], about["model"]) == ("fake", elsewhere.spec.id)
    assert curves.load(elsewhere) == curve
