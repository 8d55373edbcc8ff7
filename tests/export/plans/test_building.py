"""Differences between TensorRT's versions in building a plan; test_to_tensorrt.py builds with a stand-in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from latentrt.errors import PlanError
from latentrt.runtime.tensorrt.library import Library
from latentrt.runtime.tensorrt.record import LEVEL, REFITTABLE, STRIPPED, VERSION_COMPATIBLE
from latentrt_export.plans import building

ALL_FLAGS = ("TF32", "STRIP_PLAN", "REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL", "VERSION_COMPATIBLE")
FLAGS = SimpleNamespace(**{name: name for name in (*ALL_FLAGS, "EXCLUDE_LEAN_RUNTIME", "REQUIRE_USER_ALLOCATION")})
NO_FLAGS = SimpleNamespace()


def library(name: str, version: str, **module: Any) -> Library:
    return Library(name, SimpleNamespace(**module), version, tuple(map(int, version.split("."))))


@pytest.mark.parametrize(
    ("name", "version", "opset"),
    [
        *(("tensorrt", "10.3.0", 18), ("tensorrt", "11.4.0.106", 23)),
        ("tensorrt", "10.16.1.11", 18),  # its Attention needs four axes
        ("tensorrt-rtx", "1.7.1.116", 23),
    ],
)
def test_older_parsers_get_an_older_opset(name: str, version: str, opset: int) -> None:
    assert building.opset(library(name, version, IAttention=object)) == opset


def test_an_old_rtx_takes_no_attention() -> None:
    assert building.opset(library("tensorrt-rtx", "1.1.1")) == 18


def test_version_compatible_plans_carry_no_host_code() -> None:
    flags = building.option_flags(library("tensorrt", "10.13.3.9", BuilderFlag=FLAGS), (VERSION_COMPATIBLE,))
    assert sorted(flags) == ["EXCLUDE_LEAN_RUNTIME", "VERSION_COMPATIBLE"]


@pytest.mark.parametrize(
    ("name", "version", "flags", "options", "words"),
    [
        ("tensorrt-rtx", "1.0.0", NO_FLAGS, (STRIPPED,), "STRIP_PLAN"),
        ("tensorrt-rtx", "1.7.1.116", FLAGS, (VERSION_COMPATIBLE,), "without --version-compatible"),
        ("tensorrt-rtx", "1.7.1.116", FLAGS, (f"{LEVEL}5",), "without --optimization-level"),
        ("tensorrt", "11.4.0.106", FLAGS, (f"{LEVEL}6",), "from 0 to 5"),
        ("tensorrt", "11.4.0.106", FLAGS, (VERSION_COMPATIBLE, STRIPPED), "lean runtime cannot refit"),
        ("tensorrt", "11.4.0.106", FLAGS, (VERSION_COMPATIBLE, REFITTABLE), "lean runtime cannot refit"),
        ("tensorrt", "11.3.0.99", FLAGS, (REFITTABLE,), "not 11.3"),
        ("tensorrt", "11.3.0.99", FLAGS, (STRIPPED,), "not 11.3"),
    ],
)
def test_plans_that_a_version_cannot_build_are_refused(
    name: str, version: str, flags: Any, options: tuple[str, ...], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        building.option_flags(library(name, version, BuilderFlag=flags), options)
