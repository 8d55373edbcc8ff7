"""Things that are put together, so that the model learns what words do: colours, numbers, hats and pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from random import Random

import numpy as np
from captions import COLOURS, named
from data import SIDE, Data, Emoji, load, on_white, resized
from numpy.typing import NDArray
from PIL import Image

COUNT, SEED = 8000, 0
VAIN = 1000  # captions in a row that were made before
HUES = {"red": 0, "orange": 28, "yellow": 50, "green": 120, "blue": 215, "purple": 275, "pink": 330}  # degrees
SHADES = {"black": (0.2, 0.0, 0.4), "white": (0.12, 0.72, 0.28)}  # of saturation; of value, a constant and a part
HATS = ("crown", "top hat", "graduation cap", "woman’s hat", "billed cap", "military helmet", "rescue worker’s helmet")
ANIMALS, FOOD, THINGS = 3, 4, 7  # emojibase's groups; the others' kinds of things are mixed
SMILING, VEHICLES = 0, (54, 55, 56)  # subgroups
WEARERS = (SMILING, *range(34, 40))  # of hats: faces and animals
IRREGULAR = {"mouse": "mice", "goose": "geese", "ox": "oxen", "knife": "knives", "leaf": "leaves", "potato": "potatoes"}

Picture = NDArray[np.uint8]  # (128, 128, 4), as in `Data`


class Combiner:
    """Makes captions and pictures, the kinds in turn."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._names = {emoji.name: number for number, emoji in enumerate(data.emoji)}
        self._things = [number for number, emoji in enumerate(data.emoji) if _plain(emoji)]
        self._wearers = [number for number in self._things if data.emoji[number].subgroup in WEARERS]
        self._hats = [self._names[name] for name in HATS if name in self._names]
        self._hues = {number: hue for number in self._things if (hue := hue_of(data.pictures[number])) is not None}
        self.kinds = [self.counted, self.pair] if len(self._things) > 1 else []
        if self._hues:
            self.kinds.append(self.coloured)
        if self._hats and self._wearers:
            self.kinds.append(self.wearing)

    def make(self, count: int, seed: int, without: Sequence[str] = ()) -> tuple[list[str], NDArray[np.uint8]]:
        """So many different captions, no names and none of `without`, and their pictures on white, (N, 128, 128, 3).

        There are fewer, or none, where nothing new has come for a while: few emoji cannot be combined in many ways.
        """
        random, known = Random(seed), {*without, *self._names}
        made: dict[str, Picture] = {}
        vain = 0
        for kind in cycle(self.kinds):
            text, picture = kind(random)
            new = text not in known and text not in made
            vain = 0 if new else vain + 1
            if new:
                made[text] = on_white(picture)
            if len(made) == count or vain == VAIN:
                break
        return list(made), np.array(list(made.values()), np.uint8).reshape(-1, SIDE, SIDE, 3)

    def coloured(self, random: Random) -> tuple[str, Picture]:
        """ "purple trumpet"."""
        number = random.choice(list(self._hues))
        own = self._hues[number]
        others = [name for name, hue in HUES.items() if abs((hue - own + 180) % 360 - 180) > 35]
        colour = random.choice([*others, *SHADES])
        return f"{colour} {self._name(number)}", recoloured(self._picture(number), own, colour)

    def counted(self, random: Random) -> tuple[str, Picture]:
        """ "two apples", "three apples"."""
        number, three = random.choice(self._things), random.random() < 0.4
        picture, canvas = self._picture(number), blank()
        places = ((34, 2, 60), (2, 64, 60), (66, 64, 60)) if three else ((0, 32, 63), (65, 32, 63))
        for left, top, side in places:
            paste(canvas, picture, left, top, side)
        return f"{'three' if three else 'two'} {plural(self._name(number))}", canvas

    def wearing(self, random: Random) -> tuple[str, Picture]:
        """ "cat with a crown"."""
        number, hat = random.choice(self._wearers), random.choice(self._hats)
        picture, canvas = self._picture(number), blank()
        side, left, top = 96, 16, 32
        paste(canvas, picture, left, top, side)
        rows, columns = np.nonzero(canvas[..., 3] > 128)
        head = int(columns[rows < rows.min() + 12].mean())
        width = 52
        paste(canvas, self._picture(hat), min(max(head - width // 2, 0), SIDE - width), max(rows.min() - 36, 0), width)
        return f"{self._name(number)} with {named('a ', self._name(hat))}", canvas

    def pair(self, random: Random) -> tuple[str, Picture]:
        """ "apple and a banana"."""
        first, second = random.sample(self._things, 2)
        canvas = blank()
        paste(canvas, self._picture(first), 0, 32, 63)
        paste(canvas, self._picture(second), 65, 32, 63)
        return f"{self._name(first)} and {named('a ', self._name(second))}", canvas

    def _name(self, number: int) -> str:
        return self._data.emoji[number].name

    def _picture(self, number: int) -> Picture:
        return np.asarray(self._data.pictures[number])


def combine(work: Path) -> None:
    """Write `COUNT` captions and pictures into `work`/combined.json and `work`/combined.npy."""
    texts, pictures = Combiner(load(work)).make(COUNT, SEED)
    (work / "combined.json").write_text(json.dumps(texts, ensure_ascii=False, indent=0))
    np.save(work / "combined.npy", pictures)
    print(f"{len(texts)} combinations")


def blank() -> Picture:
    """A transparent picture."""
    return np.zeros((SIDE, SIDE, 4), np.uint8)


def paste(canvas: Picture, picture: Picture, left: int, top: int, side: int) -> None:
    """Put a picture over part of a canvas, `side` pixels large."""
    small = resized(Image.fromarray(picture, "RGBa"), side).astype(np.uint16)
    part = canvas[top : top + side, left : left + side]
    part[...] = small + part * (255 - small[..., 3:]) // 255


def hue_of(picture: Picture) -> float | None:
    """The hue of a picture in degrees; None where it has no one colour."""
    hue, saturation, value = hsv(picture)
    weights = saturation * value * (picture[..., 3] / 255)
    if weights.sum() < 0.25 * (picture[..., 3] / 255).sum():
        return None
    mean = (weights * np.exp(2j * np.pi * hue)).sum() / weights.sum()
    return float(np.degrees(np.angle(mean)) % 360) if abs(mean) > 0.8 else None


def recoloured(picture: Picture, own: float, colour: str) -> Picture:
    """The picture with its hue, `own`, turned to a colour's; black and white are less of a colour."""
    hue, saturation, value = hsv(picture)
    if colour in HUES:
        hue = (hue + (HUES[colour] - own) / 360) % 1
    else:
        less, least, part = SHADES[colour]
        saturation, value = saturation * less, least + part * value
    channels = [np.rint(255 * each).astype(np.uint8) for each in (hue, saturation, value)]
    colours = np.asarray(Image.merge("HSV", [Image.fromarray(each) for each in channels]).convert("RGB"), np.uint16)
    alpha = picture[..., 3:].astype(np.uint16)
    return np.concatenate([colours * alpha // 255, alpha], -1).astype(np.uint8)


def hsv(picture: Picture) -> tuple[NDArray[np.float64], ...]:
    """Hue, saturation and value of all pixels, (128, 128) each, 0 to 1; where nothing is they say nothing."""
    straight = np.asarray(Image.fromarray(picture, "RGBa").convert("RGBA"))[..., :3]
    found = np.asarray(Image.fromarray(np.ascontiguousarray(straight)).convert("HSV")) / 255
    return found[..., 0], found[..., 1], found[..., 2]


def plural(name: str) -> str:
    """ "cherry" makes "cherries"."""
    *before, last = name.split()
    if last in IRREGULAR:
        return " ".join([*before, IRREGULAR[last]])
    if name.endswith(("s", "x", "ch", "sh")):
        return name + "es"
    return name[:-1] + "ies" if name.endswith("y") and name[-2] not in "aeiou" else name + "s"


def kind_of(text: str) -> str:
    """ "number", "hat", "pair" or "colour"."""
    if text.startswith(("two ", "three ")):
        return "number"
    return "hat" if " with " in text else "pair" if " and " in text else "colour"


def _plain(emoji: Emoji) -> bool:
    """Whether it is one thing, with a short name that says no colour."""
    kinds = emoji.group in (ANIMALS, FOOD, THINGS) or emoji.subgroup in (SMILING, *VEHICLES)
    words = emoji.name.split()
    one = not emoji.name.endswith("s") or emoji.name.endswith(("us", "ss"))
    return kinds and one and len(words) <= 3 and not {*words} & {*COLOURS.split(), "white", "with", "and", "of"}
