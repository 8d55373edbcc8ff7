"""What text encoder and UNet learn from: captions and latents, of single emoji and of combinations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
from captions import BEFORE, caption, named
from combine import kind_of
from data import load

COMBINED = 0.35  # the part of the captions that combine


class Lessons:
    """Captions with their latents.

    Attributes:
        latents: float32 (N, 4, 16, 16): of the emoji, then of the combinations.
    """

    def __init__(self, work: Path) -> None:
        self._emoji = load(work).emoji
        self._combined: list[str] = json.loads((work / "combined.json").read_text())
        self.latents = torch.load(work / "latents.pt")
        if len(self.latents) != len(self._emoji) + len(self._combined):
            raise SystemExit(f"{work}/latents.pt is of other combinations: run the stage vae again")

    def order(self, seed: int) -> Iterator[int]:
        """Numbers of latents without end: emoji and combinations, each as often as the others of its kind."""
        random, single = Random(seed), len(self._emoji)
        emoji, combined = _shuffled(range(single), random), _shuffled(range(single, len(self.latents)), random)
        while True:
            yield next(combined if random.random() < COMBINED else emoji)

    def caption(self, number: int, random: Random) -> str:
        """One of the ways to ask for what a number stands for."""
        if number < len(self._emoji):
            return caption(self._emoji[number], random)
        text = self._combined[number - len(self._emoji)]
        return text if kind_of(text) == "number" else named(random.choice(BEFORE), text)


def _shuffled(numbers: range, random: Random) -> Iterator[int]:
    """All of them in one order, then in another, for ever."""
    while True:
        yield from random.sample(numbers, len(numbers))
