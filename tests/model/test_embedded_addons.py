"""The embedded model's own add-ons do what they are for, on a few pictures; their cards have the figures on many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED, embedded
from latentrt.images.hints import edges, grey

NAMES = json.loads((EMBEDDED / "captions.json").read_text(encoding="utf-8"))[::160]  # held out of ControlNets' training
SETTINGS = {"solver": "dpmpp-2m", "steps": 10}
INK = (16, 44, 132)
OWN = np.arange(len(NAMES))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The embedded model with its ControlNets, by name."""
    with Engine.load(threads=1, control={"grey": "emoji-grey", "edges": "emoji-edges"}) as sd:
        yield sd


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Sequence[Image.Image]:
    """What the model draws for `NAMES` by itself: nearly its training's pictures."""
    return engine(NAMES, seed=7, guidance=2.5, **SETTINGS)


def test_a_grey_picture_gets_its_colours_back(engine: Engine, plain: Sequence[Image.Image]) -> None:
    """Smaller and in a corner, where the model alone draws none of them, and most of them in colour."""
    wanted = [in_corner(image) for image in plain]
    asked = zip(NAMES, wanted, strict=True)
    drawn = [engine(name, seed=3, guidance=1.5, control={"grey": grey(one)}, **SETTINGS)[0] for name, one in asked]
    assert (nearest(pixels(drawn), pixels([*wanted, *plain])) == OWN).mean() >= 0.9
    assert (nearest(pixels(drawn), pixels([*wanted, *map(grey, wanted)])) == OWN).mean() >= 0.6


def test_lines_become_pictures(engine: Engine, plain: Sequence[Image.Image]) -> None:
    """In a corner, where the model alone draws none of them."""
    wanted = [in_corner(image) for image in plain]
    asked = zip(NAMES, wanted, strict=True)
    drawn = [engine(name, seed=3, guidance=1, control={"edges": edges(one)}, **SETTINGS)[0] for name, one in asked]
    assert (nearest(pixels(drawn), pixels([*wanted, *plain])) == OWN).mean() >= 0.8


def test_looks_are_told_apart(engine: Engine, plain: Sequence[Image.Image]) -> None:
    """What is drawn stays what it is, and most of it is nearest to its own picture in the look that is asked for."""
    looks = [mosaics(pixels(plain)), pixels([ImageOps.colorize(grey(image), INK, "white") for image in plain])]
    with Engine.load(threads=1, lora="emoji-mosaic") as sd:
        for number, look in enumerate(("emoji-mosaic", "emoji-ink")):
            sd.set_lora(look)
            drawn = pixels(sd(NAMES, seed=7, guidance=2.5, **SETTINGS))
            found = nearest(drawn, np.concatenate([*looks, pixels(plain)]))
            assert (found == OWN + number * len(NAMES)).mean() >= 0.8, look


def test_add_ons_are_no_models_but_open_by_name() -> None:
    assert embedded() == ("emoji", "pixels")


def pixels(images: Sequence[Image.Image]) -> NDArray[np.float32]:
    return np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])


def in_corner(image: Image.Image, side: int = 88) -> Image.Image:
    made = Image.new("RGB", image.size, "white")
    made.paste(image.resize((side, side)), (image.width - side, image.height - side))
    return made


def mosaics(images: NDArray[np.float32]) -> NDArray[np.float32]:
    means = images.reshape(len(images), 16, 8, 16, 8, 3).mean((2, 4))
    return means.repeat(8, 1).repeat(8, 2)


def nearest(drawn: NDArray[np.float32], rivals: NDArray[np.float32]) -> NDArray[np.intp]:
    return np.square(drawn[:, None] - rivals).sum((2, 3, 4)).argmin(1)
