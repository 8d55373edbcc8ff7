"""How many captions make what they say: the picture that is nearest, in pixels, to what a bundle draws."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from combine import Combiner, kind_of
from data import load, on_white
from numpy.typing import NDArray
from PIL.Image import Image

from latentrt import Engine, grid, save

SEED = 7
SETTINGS: dict[str, Any] = {"solver": "dpmpp-2m", "steps": 20, "guidance": 2.5}
AT_ONCE = 16
BLOCK = 256  # pictures that distances are taken from at once
COMBINED = 200  # combinations that training did not have
SHOWN = 64  # of all captions, evenly spaced
COLUMNS = 8


def check(work: Path, bundle: Path) -> None:
    """Draw every caption that the bundle knows once, number i with seed SEED + i, and new combinations likewise.

    `work`/found.json has how many are nearest to their own picture, among all emoji or, of combinations, among all that
    training had too, and what the others are nearest to; `work`/sheet.png and `work`/combined.png have a fixed choice.
    """
    data = load(work)
    captions = json.loads((bundle / "captions.json").read_text())
    names, pictures = [emoji.name for emoji in data.emoji], on_white(data.pictures)
    known = json.loads((work / "combined.json").read_text())
    texts, combined = Combiner(data).make(COMBINED, SEED, known)
    with Engine.load(bundle) as engine:
        drawn, drawn_combined = _draw(engine, captions), _draw(engine, texts)
    others = others_of(drawn, captions, names, pictures)
    rivals = np.concatenate([combined, np.load(work / "combined.npy", mmap_mode="r"), pictures])
    missed = others_of(drawn_combined, texts, [*texts, *known, *names], rivals)
    found = {
        "captions": len(captions),
        "found": len(captions) - len(others),
        "combined": len(texts),
        "combined_found": len(texts) - len(missed),
        "kinds": Counter(map(kind_of, texts)),
        "rivals": len(rivals),
        "seed": SEED,
        **SETTINGS,
        "others": others,
        "combined_others": missed,
    }
    (work / "found.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    _show(drawn, captions, work / "sheet.png")
    if texts:
        _show(drawn_combined, texts, work / "combined.png")
    print("{found} of {captions} names, {combined_found} of {combined} combinations".format(**found))


def _draw(engine: Engine, texts: Sequence[str]) -> list[Image]:
    drawn: list[Image] = []
    for first in range(0, len(texts), AT_ONCE):
        drawn += engine(texts[first : first + AT_ONCE], seed=SEED + first, **SETTINGS)
        print(f"\r{len(drawn)} of {len(texts)} drawn", end="", flush=True)
    print()
    return drawn


def others_of(
    drawn: Sequence[Image], texts: Sequence[str], names: Sequence[str], pictures: NDArray[np.uint8]
) -> dict[str, str]:
    """What those are nearest to that are not nearest to the picture of their own text."""
    distances = np.empty((len(texts), len(pictures)), np.float32)  # squared, less the drawn picture's own length
    points = np.array([np.asarray(picture) for picture in drawn], np.float32).reshape(len(drawn), pictures[0].size)
    for first in range(0, len(pictures), BLOCK):
        some = pictures[first : first + BLOCK].reshape(-1, points.shape[1]).astype(np.float32)
        distances[:, first : first + BLOCK] = np.square(some).sum(1) - 2 * points @ some.T
    places, others = {name: place for place, name in enumerate(names)}, {}
    for text, nearest in zip(texts, distances.argmin(1), strict=True):
        if not np.array_equal(pictures[nearest], pictures[places[text]]):  # some emoji look the same
            others[text] = names[nearest]
    return others


def _show(drawn: Sequence[Image], texts: Sequence[str], path: Path) -> None:
    chosen = range(0, len(texts), max(1, len(texts) // SHOWN))[:SHOWN]
    save(grid([drawn[number] for number in chosen], COLUMNS, [texts[number] for number in chosen]), path)
