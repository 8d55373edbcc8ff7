"""How well add-ons do what they are for: the nearest of many pictures, in pixels, to what is drawn with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from captions import named
from check import others_of
from combine import HUES, hue_of, recoloured
from data import Data, load, on_white
from looks import LOOKS
from numpy.typing import NDArray
from PIL import Image
from seen import HINTS, held_out, moved

from latentrt import Engine
from latentrt.request import request_from

SEED = 7
SETTINGS: dict[str, Any] = {"solver": "dpmpp-2m", "steps": 20}
GUIDANCE = 2.5  # with a prompt
AT_ONCE = 16
EVERY = 16  # so many-th name that looks are judged by

Pictures = NDArray[np.uint8]


def control(work: Path, kind: str, add_on: Path) -> None:
    """Write `work`/KIND/found.json: how many pictures follow hints of emoji that were held out of training.

    "plain" are the emoji themselves, without a prompt, "named" the same with their names; "moved" are smaller,
    elsewhere and mirrored; "coloured" have another colour, which the prompt says.
    """
    data, random = load(work), Random(SEED)
    numbers, own = held_out(data), on_white(data.pictures)
    names = [data.emoji[number].name for number in numbers]
    hints, elsewhere = own[numbers], np.stack([on_white(moved(data.pictures[number], random)) for number in numbers])
    colours = _coloured(data, numbers, random)
    every = {emoji.name: picture for emoji, picture in zip(data.emoji, own, strict=True)}
    every |= {f"moved {name}": picture for name, picture in zip(names, elsewhere, strict=True)} | colours
    found: dict[str, Any] = {}
    with Engine.load(control={kind: add_on}) as engine:
        for case, texts, pictures in (
            ("plain", names, hints),
            ("named", names, hints),
            ("moved", [f"moved {name}" for name in names], elsewhere),
            ("coloured", list(colours), np.stack(list(colours.values()))),
        ):
            said = ["" if case == "plain" else text.removeprefix("moved ") for text in texts]
            drawn = followed(engine, kind, said, pictures)
            missed = others_of(drawn, texts, list(every), np.stack(list(every.values())))
            found[case] = {"of": len(texts), "found": len(texts) - len(missed), "others": missed}
            _show(pictures, kind, drawn, work / kind / f"{case}.png")
            print(kind, case, found[case]["found"], "of", len(texts), flush=True)
    found |= {"rivals": len(every), "seed": SEED, "guidance": GUIDANCE, **SETTINGS}
    (work / kind / "found.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def followed(engine: Engine, kind: str, texts: Sequence[str], pictures: Pictures) -> list[Image.Image]:
    """Draw each text on the hint of a picture, text i with seed SEED + i; an empty one without guidance."""
    drawn: list[Image.Image] = []
    for first in range(0, len(texts), AT_ONCE):
        jobs = []
        for number, text in enumerate(texts[first : first + AT_ONCE], start=first):
            hint = HINTS[kind](Image.fromarray(pictures[number]))
            asked = {**SETTINGS, "guidance": GUIDANCE if text else 1.0, "seed": SEED + number, "control": {kind: hint}}
            jobs += engine.jobs(request_from(text, asked))
        engine.run(jobs)
        drawn += engine.pictures(jobs)
    return drawn


def _coloured(data: Data, numbers: Sequence[int], random: Random) -> dict[str, Pictures]:
    """Those that have one colour, in another: pictures by "purple trumpet"."""
    made = {}
    for number in numbers:
        own = hue_of(data.pictures[number])
        if own is not None:
            colour = random.choice([name for name, hue in HUES.items() if abs((hue - own + 180) % 360 - 180) > 35])
            made[f"{colour} {data.emoji[number].name}"] = on_white(recoloured(data.pictures[number], own, colour))
    return made


def look(work: Path, name: str, folder: Path) -> None:
    """Write `work`/NAME/found.json: how many names make their picture in this look, among all pictures in all looks."""
    emoji = [each.name for each in load(work).emoji]
    rivals = {f"3d {name}": picture for name, picture in zip(emoji, on_white(load(work).pictures), strict=True)}
    for each in LOOKS:
        numbers, pictures = json.loads((work / f"{each}.json").read_text()), np.load(work / f"{each}.npy")
        rivals |= {f"{each} {emoji[number]}": picture for number, picture in zip(numbers, pictures, strict=True)}
    asked = [emoji[number] for number in json.loads((work / f"{name}.json").read_text())][::EVERY]
    drawn: list[Image.Image] = []
    with Engine.load(lora=folder / f"{folder.name}.safetensors") as engine:
        for first in range(0, len(asked), AT_ONCE):
            some = [named("a ", text) for text in asked[first : first + AT_ONCE]]
            drawn += engine(some, seed=SEED + first, guidance=GUIDANCE, **SETTINGS)
    missed = others_of(drawn, [f"{name} {text}" for text in asked], list(rivals), np.stack(list(rivals.values())))
    in_look = sum(not other.startswith(f"{name} ") for other in missed.values())
    found = {"of": len(asked), "found": len(asked) - len(missed), "in_look": len(asked) - in_look, "others": missed}
    found |= {"rivals": len(rivals), "seed": SEED, "guidance": GUIDANCE, **SETTINGS}
    (work / name / "found.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(name, found["found"], "of", len(asked), "and in this look", found["in_look"])
    _show(np.stack([rivals[f"{name} {text}"] for text in asked]), "", drawn, work / name / "sheet.png")


def _show(pictures: Pictures, kind: str, drawn: Sequence[Image.Image], path: Path, columns: int = 12) -> None:
    """The first ones: what was given, what was drawn, and what was to be."""
    from latentrt import grid, save

    tiles: list[Image.Image] = []
    for first in range(0, min(len(drawn), 3 * columns), columns):
        own = [Image.fromarray(picture) for picture in pictures[first : first + columns]]
        blanks = [Image.new("RGB", own[0].size, "white")] * (columns - len(own))
        if kind:
            tiles += [*(HINTS[kind](picture).convert("RGB") for picture in own), *blanks]
        tiles += [*drawn[first : first + columns], *blanks, *own, *blanks]
    save(grid(tiles, columns), path)
