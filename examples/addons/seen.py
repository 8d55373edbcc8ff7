"""What ControlNets are trained on: emoji as they are, moved and mirrored, and combined; some are held out of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import numpy as np
from base import asked
from combine import Combiner, blank, kind_of, paste
from data import SIDE, Data, Emoji, on_white
from numpy.typing import NDArray
from PIL import Image

from latentrt.images.hints import edges, grey

HELD_OUT = 16  # every so many-th emoji
MOVED, COMBINED, SEED = 700, 1000, 0
SMALLEST = 72  # pixels
DROPPED = 0.5  # the part of the captions that is empty: the hint alone has to do
HINTS: dict[str, Callable[[Image.Image], Image.Image]] = {"grey": grey, "edges": edges}

Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Seen:
    """Pictures on white, uint8 (N, 128, 128, 3), and what each shows: an emoji, or a combination's caption."""

    pictures: Pictures
    shows: list[Emoji | str]

    def caption(self, number: int, random: Random) -> str:
        """What is said of a picture, or nothing; but of one with other colours than its own always something."""
        shown = self.shows[number]
        if isinstance(shown, Emoji):
            return asked(shown, random, DROPPED)
        return "" if kind_of(shown) != "colour" and random.random() < DROPPED else shown


def seen(data: Data) -> Seen:
    """All that a ControlNet is trained on: nothing that is held out is in any of it."""
    kept = [number for number in range(len(data.emoji)) if number % HELD_OUT]
    own = Data([data.emoji[number] for number in kept], data.pictures[kept])
    random = Random(SEED)
    chosen = [random.randrange(len(kept)) for _ in range(MOVED)]
    elsewhere = [on_white(moved(own.pictures[number], random)) for number in chosen]
    texts, combined = Combiner(own).make(COMBINED, SEED)
    pictures = np.concatenate([on_white(own.pictures), *(each[None] for each in elsewhere), combined])
    return Seen(pictures, [*own.emoji, *(own.emoji[number] for number in chosen), *texts])


def held_out(data: Data) -> list[int]:
    """The numbers of the emoji that no ControlNet was trained on."""
    return list(range(0, len(data.emoji), HELD_OUT))


def moved(picture: Pictures, random: Random) -> Pictures:
    """A picture (128, 128, 4) smaller, elsewhere, and half of the time mirrored."""
    canvas, side = blank(), random.randint(SMALLEST, SIDE)
    left, top = random.randint(0, SIDE - side), random.randint(0, SIDE - side)
    paste(canvas, picture[:, :: random.choice((1, -1))].copy(), left, top, side)
    return canvas


def hints(kind: str, pictures: Pictures) -> Pictures:
    """The hints of pictures (N, 128, 128, 3), made as users make them: uint8 (N, 128, 128)."""
    return np.stack([np.asarray(HINTS[kind](Image.fromarray(picture))) for picture in pictures])
