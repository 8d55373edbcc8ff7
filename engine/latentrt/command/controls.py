"""ControlNets on the command line: NAME=BUNDLE, and NAME=PICTURE[:SCALE[:START:END]]."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from latentrt.errors import RequestError
from latentrt.images.given import open_picture
from latentrt.request import Control

NUMBER = r"\d*\.?\d+"
FORM = re.compile(rf"(?P<picture>.+?)(?::(?P<scale>{NUMBER})(?::(?P<start>{NUMBER}):(?P<end>{NUMBER}))?)?")


def controlnets_of(options: Iterable[str]) -> dict[str, Path]:
    """Return bundles by name, of NAME=BUNDLE. Raise RequestError."""
    return {name: Path(text) for name, text in _named(options, "--controlnet", "NAME=BUNDLE, as in edges=canny/")}


def controls_of(options: Iterable[str], *, guess: bool) -> dict[str, Control]:
    """Return what ControlNets follow, by name, of NAME=PICTURE[:SCALE[:START:END]]; pictures are opened.

    Raises:
        RequestError: an option has another form, a number is out of range, or there is no such picture.
    """
    return {name: _control(text, guess=guess) for name, text in _named(options, "--control", "NAME=PICTURE")}


def _named(options: Iterable[str], option: str, form: str) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for text in options:
        name, _, value = text.partition("=")
        if not name or not value:
            raise RequestError(f"{option} is {text!r}", needed=form)
        if name in dict(pairs):
            raise RequestError(f"there are two {option} {name}", needed="a name for each")
        pairs.append((name, value))
    return pairs


def _control(text: str, *, guess: bool) -> Control:
    """Read PICTURE[:SCALE[:START:END]]; a file whose whole name is that is meant by it."""
    parts = FORM.fullmatch(text)
    if parts is None or Path(text).is_file():
        return Control(open_picture(text), guess=guess)
    numbers = {name: float(parts[name]) for name in ("scale", "start", "end") if parts[name] is not None}
    return Control(open_picture(parts["picture"]), guess=guess, **numbers)
