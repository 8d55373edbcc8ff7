"""Pictures of add-ons on the command line: NAME[@TYPE]=PICTURE[:SCALE[:START:END]] of ControlNets; of IP-Adapters
NAME=PICTURE[:SCALE].
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentrt.errors import RequestError
from latentrt.guides import Control, ImagePrompt
from latentrt.images.given import open_picture
from latentrt.values import named

NUMBER = r"\d*\.?\d+"
PROMPT = re.compile(rf"(?P<picture>.+?):(?P<scale>{NUMBER})")
FORM = re.compile(rf"(?P<picture>.+?)(?::(?P<scale>{NUMBER})(?::(?P<start>{NUMBER}):(?P<end>{NUMBER}))?)?")


def controls_of(options: Iterable[str], *, guess: bool) -> dict[str, Control]:
    """Return what ControlNets follow, by name, of NAME=PICTURE[:SCALE[:START:END]]; pictures are opened.

    A ControlNet Union's name is NAME@TYPE: the kind of its map.

    Raises:
        RequestError: an option has another form, a number is out of range, or there is no such picture.
    """
    found = dict[str, Control]()
    for key, text in named(options, "--control", "NAME=PICTURE").items():
        name, _, kind = key.partition("@")
        control = _control(text, guess=guess)
        if name in found:
            raise RequestError(f"--control has {name} twice", needed="one of them")
        found[name] = replace(control, type=int(kind) if kind.isdecimal() else kind) if kind else control
    return found


def image_prompts_of(options: Iterable[str]) -> dict[str, ImagePrompt]:
    """Return what IP-Adapters show, by name, of NAME=PICTURE[:SCALE]; pictures are opened.

    Raises:
        RequestError: as of `controls_of`.
    """
    return {name: _image_prompt(text) for name, text in named(options, "--ip-adapter", "NAME=PICTURE").items()}


def _image_prompt(text: str) -> ImagePrompt:
    parts = PROMPT.fullmatch(text)
    if parts is None or Path(text).is_file():
        return ImagePrompt(open_picture(text))
    return ImagePrompt(open_picture(parts["picture"]), float(parts["scale"]))


def _control(text: str, *, guess: bool) -> Control:
    """Read PICTURE[:SCALE[:START:END]]; a file whose whole name is that is meant by it."""
    parts = FORM.fullmatch(text)
    if parts is None or Path(text).is_file():
        return Control(open_picture(text), guess=guess)
    numbers: dict[str, Any] = {
        name: float(parts[name]) for name in ("scale", "start", "end") if parts[name] is not None
    }
    return Control(open_picture(parts["picture"]), guess=guess, **numbers)
