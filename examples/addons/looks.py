"""Emoji in two other looks, drawn from SVG: flat, and high contrast (both Fluent, MIT), matched by code point."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from data import SIDE, entries, file_of, load, member, package, spellings
from numpy.typing import NDArray

FLAT, CONTRAST = "@lobehub/fluent-emoji-flat@1.1.0", "@iconify-json/fluent-emoji-high-contrast@1.2.6"
RENDERER = "@resvg/resvg-wasm@2.6.2"
LOOKS = ("flat", "contrast")
INK = "#212121"  # of high contrast
AT_ONCE = 64
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32" width="32" height="32">{}</svg>'


def collect(work: Path) -> None:
    """Fetch the packages by npm, and write `work`/NAME.npy and `work`/NAME.json of each look.

    The first are pictures on white, uint8 (N, 128, 128, 3), the second the numbers of the emoji that they show.
    """
    codes = {entry["label"].lower(): entry["hexcode"].lower() for entry in entries(work)}
    ordered = [codes[emoji.name] for emoji in load(work).emoji]
    for look, found in (("flat", _flat(ordered, work)), ("contrast", _contrast(ordered, work))):
        pictures = drawn(list(found.values()), work)
        np.save(work / f"{look}.npy", pictures)
        (work / f"{look}.json").write_text(json.dumps(list(found)))
        print(f"{look}: {len(found)} of {len(ordered)}")


def drawn(svgs: list[str], work: Path, side: int = SIDE) -> NDArray[np.uint8]:
    """SVGs on white, uint8 (N, side, side, 3), by resvg in Node.js."""
    folder = work / "resvg"
    if not folder.exists():
        with package(RENDERER, work) as renderer:
            renderer.extractall(folder, filter="data")
    command = ["node", str(Path(__file__).with_name("render.mjs")), str(folder), str(side)]
    made = []
    for first in range(0, len(svgs), AT_ONCE):
        some = json.dumps(svgs[first : first + AT_ONCE]).encode()
        made.append(subprocess.run(command, input=some, check=True, stdout=subprocess.PIPE).stdout)
    return np.frombuffer(b"".join(made), np.uint8).reshape(-1, side, side, 4)[..., :3]


def _flat(codes: list[str], work: Path) -> dict[int, str]:
    with package(FLAT, work) as pictures:
        files = {number: file_of(pictures, code, "svg") for number, code in enumerate(codes)}
        return {number: file.read().decode() for number, file in files.items() if file is not None}


def _contrast(codes: list[str], work: Path) -> dict[int, str]:
    with package(CONTRAST, work) as icons:
        names = json.load(member(icons, "chars.json"))
        bodies = {name: icon["body"] for name, icon in json.load(member(icons, "icons.json"))["icons"].items()}

    def found() -> Iterator[tuple[int, str]]:
        for number, code in enumerate(codes):
            name = next((names[each] for each in spellings(code) if each in names), None)
            if name in bodies:
                yield number, SVG.format(bodies[name].replace("currentColor", INK))

    return dict(found())
