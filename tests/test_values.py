"""Kinds of values: what is a number, and what numpy's become."""

from __future__ import annotations

import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from latentrt.values import is_number, is_whole, plain

WHOLE: list[Any] = [0, -3, 10**400, np.int8(5), np.uint64(2**64 - 1)]
REAL: list[Any] = [0.5, -1e308, np.float16(3), np.float32(1e-40), np.float64(7), np.longdouble(2), Fraction(1, 3)]
NONE: list[Any] = [True, np.True_, "5", None, 1j, np.complex64(1), Decimal(1), np.array([1, 2]), b"5"]


def test_what_is_a_number() -> None:
    assert all(map(is_whole, WHOLE))
    assert not any(map(is_whole, REAL + NONE))
    assert all(map(is_number, REAL + [value for value in WHOLE if value != 10**400]))
    infinite: list[Any] = [10**400, float("inf"), float("nan"), np.float16("inf"), np.float32("nan")]
    assert not any(map(is_number, NONE + infinite))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(5), 5),
        (np.float32(0.5), 0.5),
        (np.longdouble(0.5), 0.5),
        (np.True_, True),
        (np.str_("a"), "a"),
        (np.array(3), 3),
        (np.array([1.5, 2]), [1.5, 2.0]),
        ([np.int8(1), (np.float16(2),)], [1, (2.0,)]),
        (Fraction(1, 2), 0.5),
        ("text", "text"),
        (None, None),
        (10**400, 10**400),
    ],
)
def test_plain_values(value: Any, expected: Any) -> None:
    made = plain(value)
    assert (made, type(made)) == (expected, type(expected))
    assert all(type(a) is type(b) for a, b in zip(made, expected, strict=True)) if isinstance(made, list) else True


def test_the_largest_float_is_a_number() -> None:
    assert is_number(sys.float_info.max)
    assert is_number(int(sys.float_info.max))
