"""The recipe of the embedded model's add-ons: what is held out, looks, and, slowly, all its stages but npm's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = [f"{colour} {thing}" for thing in ("apple", "ball", "box", "bus", "cup") for colour in ("big", "old", "new")]
FRUIT, THINGS = 4, 7


@pytest.fixture(autouse=True)
def recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the recipe's modules importable, on a CPU, and all their sizes small."""
    for folder in ("shared", "emoji", "addons"):
        monkeypatch.syspath_prepend(str(EXAMPLES / folder))
    import base
    import control
    import lora
    import seen
    import training

    ticks = iter(range(10**6))
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    for module in (training, base, control):
        monkeypatch.setattr(module, "device", lambda: torch.device("cpu"))
    for module, name, value in ((seen, "MOVED", 2), (seen, "COMBINED", 3), (seen, "HELD_OUT", 8)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(control, "PICTURES", 2)
    monkeypatch.setattr(lora, "PICTURES", 2)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Write what the stage `data` leaves, for made-up emoji of one colour each."""
    y, x = np.mgrid[:128, :128]
    pictures = np.zeros((len(NAMES), 128, 128, 4), np.uint8)
    for number, picture in enumerate(pictures):
        picture[np.hypot(x - 64, y - 64) < 30 + 2 * number] = (*np.roll((220, 60, 40), number), 255)
    np.save(tmp_path / "pictures.npy", pictures)
    entries = [{"name": name, "tags": ["thing"], "group": THINGS, "subgroup": 0} for name in NAMES]
    (tmp_path / "emoji.json").write_text(json.dumps(entries))
    return tmp_path


def test_what_is_held_out_is_in_nothing_that_is_learnt(work: Path) -> None:
    from data import load
    from seen import held_out, hints, seen

    data = load(work)
    without = {data.emoji[number].name for number in held_out(data)}
    lessons = seen(data)
    assert len(without) == 2
    assert len(lessons.pictures) == len(lessons.shows) == len(NAMES) - 2 + 2 + 3
    for number in range(len(lessons.shows)):
        said = {lessons.caption(number, Random(seed)) for seed in range(8)}
        assert not any(name in text for name in without for text in said)
    assert hints("edges", lessons.pictures).shape == hints("grey", lessons.pictures).shape == (18, 128, 128)


def test_a_mosaic_has_tiles_of_one_colour() -> None:
    from looks import TILES, mosaic

    picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)
    tiles = mosaic(picture).reshape(TILES, 8, TILES, 8, 3)
    assert (tiles == tiles[:, :1, :, :1]).all()
    np.testing.assert_allclose(tiles[:, 0, :, 0], picture.reshape(TILES, 8, TILES, 8, 3).mean((1, 3)), atol=1)


@pytest.mark.slow
def test_all_stages_from_pictures_to_what_is_shipped(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import control
    import judge
    import looks
    import lora
    import ship
    from data import load, on_white

    monkeypatch.setattr(judge, "SETTINGS", {"solver": "ddim", "steps": 2})
    own = np.stack([looks.mosaic(each) for each in on_white(load(work).pictures)])
    for look in looks.LOOKS:
        np.save(work / f"{look}.npy", own)
        (work / f"{look}.json").write_text(json.dumps([*range(len(NAMES))]))
    for name, train in (("mosaic", lora.train), ("grey", control.train)):
        train(work, name, 2 / 60)
        ship.pack(work, name)
        (judge.look if name in looks.LOOKS else judge.control)(work, name, ship.shipped(work, name))
        ship.card(work, name)
    cards: Iterator[Any] = (ship.shipped(work, name) / "README.md" for name in ("mosaic", "grey"))
    assert all("of 2" in card.read_text() or "of 1" in card.read_text() for card in cards)
