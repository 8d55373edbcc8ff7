"""Emoji in other looks: mosaics, in blue ink, and flat ones, which are SVGs (Fluent, MIT), matched by code point."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
from data import SIDE, entries, file_of, load, on_white, package
from numpy.typing import NDArray
from PIL import Image, ImageOps

FLAT, RENDERER = "@lobehub/fluent-emoji-flat@1.1.0", "@resvg/resvg-wasm@2.6.2"
LOOKS = ("mosaic", "ink", "flat")
TILES = 16  # of a mosaic, along each side: one for each latent
INK, PAPER = (16, 44, 132), (255, 255, 255)
AT_ONCE = 64


def collect(work: Path) -> None:
    """Fetch the packages by npm, and write `work`/NAME.npy and `work`/NAME.json of each look.

    The first are pictures on white, uint8 (N, 128, 128, 3), the second the numbers of the emoji that they show.
    """
    data = load(work)
    codes = {entry["label"].lower(): entry["hexcode"].lower() for entry in entries(work)}
    flat = _flat([codes[emoji.name] for emoji in data.emoji], work)
    _keep(work, "flat", list(flat), drawn(list(flat.values()), work))
    own, every = on_white(data.pictures), list(range(len(data.emoji)))
    _keep(work, "mosaic", every, np.stack([mosaic(each) for each in own]))
    _keep(work, "ink", every, np.stack([ink(each) for each in own]))


def _keep(work: Path, look: str, numbers: list[int], pictures: NDArray[np.uint8]) -> None:
    np.save(work / f"{look}.npy", pictures)
    (work / f"{look}.json").write_text(json.dumps(numbers))
    print(f"{look}: {len(numbers)} emoji")


def mosaic(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture of 16 x 16 tiles, each of one colour."""
    tiles = Image.fromarray(picture).resize((TILES, TILES), Image.Resampling.BOX)
    return np.asarray(tiles.resize(picture.shape[1::-1], Image.Resampling.NEAREST))


def ink(picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A picture's brightness, from blue ink to white paper."""
    grey = Image.fromarray(picture).convert("L")
    return np.asarray(ImageOps.colorize(grey, INK, PAPER))


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
