"""Kinds of values from users and JSON, and how they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from latentrt.errors import RequestError


def is_whole(value: object) -> bool:
    """Return whether it is an integer, of Python or of numpy, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether it is a finite number, of Python or of numpy, and no bool."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an int beyond all floats
        return False


def check_number(name: str, value: object, low: float, high: float) -> None:
    """Raise RequestError where a value is no finite number, or out of range."""
    if not is_number(value) or not low <= float(value) <= high:  # type: ignore[arg-type]
        raise RequestError(f"{name} is {value!r}", needed=f"a finite number from {low:g} to {high:g}")


def is_text(value: object) -> bool:
    """Return whether it is a str that is not empty."""
    return isinstance(value, str) and value != ""


def plain(value: Any) -> Any:
    """Return numpy's numbers, bools, texts and arrays as Python's, in lists and tuples too; else the value itself."""
    if isinstance(value, Real) and not isinstance(value, (int, float)):
        return int(value) if isinstance(value, Integral) else float(value)
    if hasattr(value, "dtype") and hasattr(value, "tolist"):  # numpy is not imported for this: commands start sooner
        return value.tolist()
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value


MOST = 65_536


def parse_whole(text: str, name: str, *, least: int = 1, most: int = MOST) -> int:
    """Read a whole number in plain digits.

    Raises:
        RequestError: it is none, or out of range; the message has `name`.
    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10 and least <= int(digits) <= most):
        raise RequestError(f"{name} has {text!r}", needed=f"whole numbers from {least} to {most}")
    return int(digits)


def parse_size(text: str, name: str) -> tuple[int, int]:
    """Read (width, height) in pixels from "512x768"; one number is both. Raise RequestError as `parse_whole`."""
    width, _, height = text.lower().partition("x")
    return parse_whole(width, name), parse_whole(height or width, name)


def did_you_mean(word: object, words: Iterable[str], otherwise: str = "") -> str:
    """Return "did you mean a or b?" with the words most like this one; `otherwise` where none is."""
    near = get_close_matches(str(word), list(words), n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def named(texts: Iterable[str], option: str, form: str) -> dict[str, str]:
    """Return the values of an option that is given as NAME=VALUE, by name.

    Args:
        texts: what was typed.
        option: its name, and `form` how it is given, for errors.

    Raises:
        RequestError: a text has another form, or a name is given twice.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if not name or not value:
            raise RequestError(f"{option} is {text!r}", needed=form)
        if name in found:
            raise RequestError(f"there are two {option} {name}", needed="a name for each")
        found[name] = value
    return found
