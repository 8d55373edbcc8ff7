"""The pictures: faces, hearts, flowers, fruit and vegetables among Fluent 3D emoji, 32 pixels large."""

from __future__ import annotations

from pathlib import Path

import data
import numpy as np
from data import Emoji
from numpy.typing import NDArray
from PIL import Image

SIDE = 32
FACES, PLANTS = range(15), (40, 42, 43)  # subgroups of emojibase: smileys to hearts; flowers, fruit, vegetables
ANIMALS = (  # whose emoji is a face
    *("bear", "cat face", "cow face", "dog face", "fox", "hamster", "koala", "lion", "monkey face", "mouse face"),
    *("panda", "pig face", "polar bear", "rabbit face", "raccoon", "tiger face", "wolf"),
)


def collect(work: Path, source: Path) -> None:
    """Write the chosen pictures on white, uint8 (N, 32, 32, 3), into `work`/pixels.npy.

    `source` is the work folder of the recipe of the emoji model; its stage `data` runs where it has not yet.
    """
    found = data.load(source) if (source / "pictures.npy").exists() else data.collect(source)
    chosen = [picture for emoji, picture in zip(found.emoji, found.pictures, strict=True) if _wanted(emoji)]
    pixels = data.on_white(np.stack([_small(picture) for picture in chosen]))
    work.mkdir(parents=True, exist_ok=True)
    np.save(work / "pixels.npy", pixels)
    print(f"{len(pixels)} of {len(found.emoji)} emoji, {SIDE} x {SIDE}")


def load(work: Path) -> NDArray[np.uint8]:
    """Return what `collect` wrote."""
    if not (work / "pixels.npy").exists():
        raise SystemExit(f"{work} has no pixels.npy: run the stage data first")
    pixels: NDArray[np.uint8] = np.load(work / "pixels.npy")
    return pixels


def _wanted(emoji: Emoji) -> bool:
    return emoji.subgroup in (*FACES, *PLANTS) or emoji.name in ANIMALS


def _small(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resize with premultiplied alpha: on white no edge gets a dark fringe."""
    return data.resized(Image.fromarray(picture, "RGBa"), SIDE)
