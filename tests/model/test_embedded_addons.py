"""The embedded model's own add-ons do what they are for, on a few pictures; their cards have the figures on many."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from latentrt import Engine
from latentrt.bundle.bundle import EMBEDDED, embedded
from latentrt.images.hints import edges, grey
from latentrt.images.picture import Picture

HINTS: dict[str, Callable[[Image.Image], Image.Image]] = {"grey": grey, "edges": edges}
NAMES = json.loads((EMBEDDED / "captions.json").read_text(encoding="utf-8"))[::160]  # held out of ControlNets' training
SETTINGS = {"solver": "dpmpp-2m", "steps": 10}


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The embedded model with its ControlNets, by name."""
    with Engine.load(threads=1, control={kind: f"emoji-{kind}" for kind in HINTS}) as sd:
        yield sd


@pytest.fixture(scope="module")
def plain(engine: Engine) -> list[Picture]:
    """What the model draws for `NAMES` by itself: nearly its training's pictures."""
    return engine(NAMES, seed=7, guidance=2.5, **SETTINGS)


def pixels(images: list[Picture] | list[Image.Image]) -> NDArray[np.float32]:
    return np.stack([np.asarray(image.convert("RGB"), np.float32) for image in images])


@pytest.mark.parametrize("kind", HINTS)
def test_a_hint_alone_makes_its_picture(kind: str, engine: Engine, plain: list[Picture]) -> None:
    """Without a prompt, nine of ten are nearest to the picture of their hint: not its grey copy, nor another's."""
    hints = [HINTS[kind](image) for image in plain]
    drawn = pixels([engine("", seed=3, guidance=1.0, control={kind: hint}, **SETTINGS)[0] for hint in hints])
    rivals = pixels([*plain, *map(grey, plain)])
    nearest = np.square(drawn[:, None] - rivals).sum((2, 3, 4)).argmin(1)
    assert (nearest == np.arange(len(plain))).mean() >= 0.9


def test_add_ons_are_no_models_but_open_by_name() -> None:
    assert embedded() == ("emoji", "pixels")
