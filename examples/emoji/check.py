"""How many captions make their own emoji: the picture that is nearest to what a bundle draws, in pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from data import load, on_white

from engine import Engine, grid, save

SEED = 7
SETTINGS: dict[str, Any] = {"solver": "dpmpp-2m", "steps": 20, "guidance": 2.5}
AT_ONCE = 16
SHOWN = 64  # of all captions, evenly spaced; COLUMNS wide
COLUMNS = 8


def check(work: Path, bundle: Path) -> None:
    """Draw every caption that the bundle knows once, number i with seed SEED + i, and write what was found.

    `work`/found.json has the share and, for every caption that made another emoji, which; `work`/sheet.png a fixed
    choice of the pictures.
    """
    data = load(work)
    captions = json.loads((bundle / "captions.json").read_text())
    numbers = {emoji.name: number for number, emoji in enumerate(data.emoji)}
    pictures = on_white(data.pictures).astype(np.float32).reshape(len(data.emoji), -1)
    lengths = np.square(pictures).sum(1)
    drawn, others = [], {}
    with Engine.load(bundle) as engine:
        for first in range(0, len(captions), AT_ONCE):
            some = captions[first : first + AT_ONCE]
            drawn += engine(some, seed=SEED + first, **SETTINGS)
            for caption, picture in zip(some, drawn[first:], strict=True):
                pixels = np.asarray(picture, np.float32).ravel()
                distances = lengths - 2 * pictures @ pixels  # but for the picture's own length
                nearest = int(distances.argmin())
                if not np.array_equal(pictures[nearest], pictures[numbers[caption]]):  # some emoji look the same
                    others[caption] = data.emoji[nearest].name
            print(f"{len(drawn)} of {len(captions)}: {1 - len(others) / len(drawn):.1%} found", flush=True)
    found = {
        "captions": len(captions),
        "found": len(captions) - len(others),
        "seed": SEED,
        **SETTINGS,
        "others": others,
    }
    (work / "found.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    chosen = range(0, len(captions), max(1, len(captions) // SHOWN))[:SHOWN]
    sheet = grid([drawn[number] for number in chosen], COLUMNS, [captions[number] for number in chosen])
    save(sheet, work / "sheet.png")
