"""Which LoRAs a user gives, and how strong: FILE, FILE:0.8 or FILE:0.8:0.5."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from latentrt.errors import AdapterError
from latentrt.values import is_number, is_text, plain

MOST_STRENGTH = 1000.0  # of a request's
NEEDED = "FILE, FILE:STRENGTH, or FILE:STRENGTH:STRENGTH of the text encoders"


@dataclass(frozen=True, slots=True)
class Lora:
    """A file and its strengths.

    Attributes:
        path: a .safetensors file, or the folder in which peft saved one.
        unet, text: how much of it is added to the UNet and to the text encoders; 0 leaves them as they are.

    Raises:
        AdapterError: a strength is no finite number.
    """

    path: Path
    unet: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        for strength in (self.unet, self.text):
            if not math.isfinite(strength):
                raise AdapterError(f"the strength of {self.path} is {strength}", needed="a finite number")

    def strength(self, network: str) -> float:
        """Return how much of it is added to a network."""
        return self.unet if network == "unet" else self.text

    def __str__(self) -> str:
        both = f"{self.unet:g}" if self.unet == self.text else f"{self.unet:g}:{self.text:g}"
        return f"{self.path.name}:{both}"


Given = str | Path | Lora
Loras = Given | Iterable[Given] | Mapping[str | Path, float | tuple[float, float]]


def loras_of(given: Loras, *, allow_unmatched: bool = False) -> tuple[Lora, ...]:
    """Return the LoRAs of a call.

    Args:
        given: one or several, each a `Lora`, a path, or text as in `parsed`; or strengths by path.
        allow_unmatched: whether keys of theirs may be left out.

    Raises:
        AdapterError: a strength is no number; or there are none, and keys may be left out.
    """
    if isinstance(given, (str, Path, Lora)):
        given = [given]
    loras = tuple(_by_path(given) if isinstance(given, Mapping) else map(_one, given))
    if allow_unmatched and not loras:
        raise AdapterError("allow_unmatched without a LoRA", needed="one", fix="add --lora FILE")
    return loras


def _by_path(strengths: Mapping[str | Path, float | tuple[float, float]]) -> Iterator[Lora]:
    for path, strength in strengths.items():
        unet, text = strength if isinstance(strength, tuple) else (strength, strength)
        try:
            yield Lora(Path(path), float(unet), float(text))
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the strength of {path} is {strength!r}", needed="a number, or two") from error


def _one(given: Given) -> Lora:
    if isinstance(given, str):
        return parsed(given)
    return given if isinstance(given, Lora) else Lora(Path(given))


def strengths_of(given: object) -> dict[str, tuple[float, float]]:
    """Return the strengths (UNet, text encoders) of a request's LoRAs by name, each given as a number or two.

    Raises:
        AdapterError: a name is no text, or a strength no finite number from -1000 to 1000.
    """
    if not isinstance(given, Mapping) or not all(map(is_text, given)):
        raise AdapterError(f"lora is {given!r}", needed="strengths by name", fix='pass lora={"name": 0.8}')
    found = {}
    for name, value in given.items():
        both = plain(value)
        pair = tuple(both) if isinstance(both, (list, tuple)) else (both, both)
        if len(pair) != 2 or not all(is_number(each) and abs(each) <= MOST_STRENGTH for each in pair):
            needed = f"a number from -{MOST_STRENGTH:g} to {MOST_STRENGTH:g}, or two: the UNet's and the text encoders'"
            raise AdapterError(f"the strength of the LoRA {name!r} is {value!r}", needed=needed)
        found[name] = (float(pair[0]), float(pair[1]))
    return found


def parsed(text: str) -> Lora:
    """Return what a command line says: FILE, FILE:0.8, or FILE:0.8:0.5, of the UNet and of the text encoders.

    A file whose own name has a colon and exists is taken as it is.

    Raises:
        AdapterError: what follows the file is no number.
    """
    path, *strengths = text.split(":")
    if Path(text).exists() or not strengths:
        return Lora(Path(text))
    while len(strengths) > 2 or (strengths and not _is_number(strengths[0]) and len(strengths) > 1):
        path = f"{path}:{strengths.pop(0)}"
    if not path or not all(map(_is_number, strengths)):
        raise AdapterError(f"the LoRA is {text!r}", needed=NEEDED)
    return Lora(Path(path), float(strengths[0]), float(strengths[-1]))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
