"""How a text encoder is told a prompt: rows of token ids, and how their states become the prompt's.

A grammar (`registry.py`) turns a prompt and an encoder's tokenizer into a `Reading`. It knows no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from latentrt.model.prompts.tokenizer import GIVEN, Tokenizer

Float32 = NDArray[np.float32]
Ids = NDArray[np.int64]


class Row(NamedTuple):
    """What a text encoder is called with: ids (77,), and which of them it attends to, 1 or 0 (77,); None is all."""

    ids: Ids
    mask: Ids | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Reading:
    """A prompt as one text encoder reads it.

    Attributes:
        rows: each is encoded alone.
        weights: of the rows' tokens, float32 (rows, 77).
        combine: makes the prompt's states (tokens, dim) of the rows' (rows, 77, dim), float32.
        tokens: how many states the prompt has.
        pooled: the row whose pooled state stands for the prompt.
        dropped: the end of the prompt that is not read.
    """

    rows: tuple[Row, ...]
    weights: Float32
    combine: Callable[[Float32], Float32]
    tokens: int
    pooled: Row
    dropped: str = ""

    @property
    def given(self) -> bool:
        """Whether it has vectors of textual inversion."""
        return any(bool((row.ids >= GIVEN).any()) for row in (*self.rows, self.pooled))

    @property
    def masked(self) -> bool:
        """Whether an encoder attends to a part of a row only."""
        return any(row.mask is not None for row in self.rows)

    @property
    def plain(self) -> bool:
        """Whether its states are those that the encoder gives for one row of its own ids, unchanged."""
        return self.combine is first and self.pooled is self.rows[0] and not self.given


Grammar = Callable[[str, Tokenizer], Reading]


def first(states: Float32) -> Float32:
    """Return the states of the first row."""
    alone: Float32 = states[0]
    return alone
