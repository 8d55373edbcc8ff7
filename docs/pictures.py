"""Make the README's pictures: `make pictures`. Captions by a fixed rule and one seed, nothing chosen by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from latentrt import Engine, grid, save
from latentrt.bundle.bundle import EMBEDDED

IMAGES = Path(__file__).parent / "images"
EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"steps": 20, "solver": "dpmpp-2m", "guidance": 2.5, "seed": 0}
COLUMNS = 8
THINGS = ("camel", "whale", "lobster", "hedgehog", "dog", "squid")
COLOURS = ("purple", "red", "green", "pink", "purple", "yellow")  # of these things training had no such picture


def spread(count: int) -> list[str]:
    """So many of the captions that the embedded model knows, from all parts of the list."""
    known = json.loads((EMBEDDED / "captions.json").read_text(encoding="utf-8"))
    return list(known[:: len(known) // count][:count])


def sheet(engine: Engine) -> None:
    """What it looks like, at the README's head."""
    captions = spread(3 * COLUMNS)
    images = engine(captions, **SETTINGS)
    save(grid(images, COLUMNS, captions), IMAGES / "sheet.png", settings={"prompt": "; ".join(captions), **SETTINGS})


def combinations() -> list[str]:
    """Six things, in a line each: with the next one, in a colour, two, three, and with two hats."""
    return [
        *(f"a {thing} and a {other}" for thing, other in zip(THINGS, THINGS[1:] + THINGS[:1], strict=True)),
        *(f"a {colour} {thing}" for colour, thing in zip(COLOURS, THINGS, strict=True)),
        *(f"{number} {thing}s" for number in ("two", "three") for thing in THINGS),
        *(f"a {thing} with a {hat}" for hat in ("crown", "top hat") for thing in THINGS),
    ]


def by_command(name: str, *words: str, shown: str = "--grid") -> None:
    """A sheet or animation made by the command itself."""
    settings = ("--solver", "dpmpp-2m", "--seed", "0")
    with TemporaryDirectory() as folder:
        words = (*words, *settings, "--output", f"{folder}/{{index}}", shown, str(IMAGES / name))
        subprocess.run((sys.executable, "-m", "latentrt", "generate", *words), check=True)


def forward_noise() -> None:
    """The sheet of `examples/forward_noise.py`."""
    subprocess.run((sys.executable, EXAMPLES / "forward_noise.py"), check=True, cwd=IMAGES)


def step_caching(engine: Engine) -> None:
    """The same pictures with every row in full, then every second, third and fifth."""
    captions, images, under = spread(COLUMNS), [], []
    for interval in (1, 2, 3, 5):
        images += engine(captions, **SETTINGS, cache_interval=interval)
        under += [f"interval {interval}"] * COLUMNS
    save(
        grid(images, COLUMNS, under), IMAGES / "step-caching.png", settings={"prompt": "; ".join(captions), **SETTINGS}
    )


def tiles(prompt: str = "a red apple", tile: int = 128) -> None:
    """A picture decoded at once, the same in tiles, and where they differ, amplified to half of the range."""
    drawn = []
    for side in (None, tile):
        with Engine.load(tile=side) as engine:
            drawn += engine(prompt, width=256, height=256, **SETTINGS)
    whole, tiled = (np.asarray(image).astype(int) for image in drawn)
    gain = max(1, 127 // max(1, abs(tiled - whole).max()))
    apart = Image.fromarray((127 + gain * (tiled - whole)).astype(np.uint8))
    under = ["at once", f"tiles of {tile}", f"difference x{gain}"]
    save(grid([*drawn, apart], 3, under), IMAGES / "tiles.png", settings={"prompt": prompt, **SETTINGS})


if __name__ == "__main__":
    with Engine.load() as engine:
        sheet(engine)
        step_caching(engine)
    by_command("captions.png", *spread(64), "--guidance", "2.5")
    by_command("combined.png", *combinations(), "--guidance", "2.5")
    by_command("pixels.png", "--bundle", "pixels", "--count", "64", "--steps", "50")
    by_command("denoising.webp", *spread(4), "--guidance", "2.5", shown="--animate")
    forward_noise()
    tiles()
