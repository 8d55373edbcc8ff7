"""The command's arguments: from what a user typed to values."""

from __future__ import annotations

import json
from typing import Any

from latentrt.errors import RequestError


def size_of(text: str | None) -> tuple[int | None, int | None]:
    """Width and height of WIDTHxHEIGHT; one number is both."""
    if text is None:
        return None, None
    width, _, height = text.lower().partition("x")
    return whole_of(width, "--size"), whole_of(height or width, "--size")


def whole_of(text: str, name: str, *, least: int = 0) -> int:
    """A whole number in plain digits, or a RequestError that names the option."""
    digits = text.strip()
    if not (digits.isascii() and digits.isdecimal() and len(digits) < 10) or int(digits) < least:
        raise RequestError(
            f"{name} has {text!r}", "whole numbers, as in --size 512x512 or --batches 1,2,4", f"change {name}"
        )
    return int(digits)


def options_of(pairs: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE pairs; a value is JSON where it can be, else text."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise RequestError(f"--option is {pair!r}", "KEY=VALUE, as in eta=0.5", "change --option")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options
