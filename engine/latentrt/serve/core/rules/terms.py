"""What the operator has promised a client, as it is written behind its key: `KEY share=2 priority=1 places=8`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from latentrt.errors import RequestError


class Terms(NamedTuple):
    """What a client has been promised.

    Attributes:
        share: of the work, beside the 1 of a client without terms.
        priority: clients with a higher one get lanes first.
        places: pictures that may wait and run at once; None: as many as there is room for.
    """

    share: float = 1.0
    priority: int = 0
    places: int | None = None


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError(text)
    return number


def _places(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


KINDS: dict[str, tuple[Callable[[str], Any], str]] = {
    "share": (_share, "a number above 0"),
    "priority": (int, "a whole number"),
    "places": (_places, "a whole number of 1 or more"),
}


def key_and_terms(line: str) -> tuple[str, Terms]:
    """Return the key in a line and what stands behind it. Other words belong to the key, which may have spaces.

    Raises:
        RequestError: a value cannot be; the message does not have the key.
    """
    words, found = line.split(), dict[str, Any]()
    while len(words) > 1 and words[-1].partition("=")[0] in KINDS and "=" in words[-1]:
        name, _, text = words.pop().partition("=")
        parse, needed = KINDS[name]
        try:
            found[name] = parse(text)
        except ValueError:
            raise RequestError(
                f"a key has {name}={text}", needed=needed, fix=f"correct {name}, or leave it out"
            ) from None
    return (" ".join(words) if found else line), Terms(**found)
