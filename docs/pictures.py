"""Make the pictures of the README and of docs: `make pictures`. One seed, and captions by a fixed rule.

A function whose captions were chosen by looking says so.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image
from scribbles import THINGS as DRAWN
from scribbles import scribble

from latentrt import Engine, grid, save
from latentrt.bundle.bundle import EMBEDDED
from latentrt.images.hints import grey, inverted
from latentrt.request import request_from

IMAGES = Path(__file__).parent / "images"
EXAMPLES = Path(__file__).parents[1] / "examples"
SETTINGS = {"steps": 20, "solver": "dpmpp-2m", "guidance": 2.5, "seed": 0}
COLUMNS = 8
LOOKS = ("emoji-mosaic", "emoji-ink")  # LoRAs
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


def hires_fix(engine: Engine, scale: float = 1.25, strength: float = 0.3) -> None:
    """Things of few parts, and an owl, which has more: as they are drawn, and with hires fix. Chosen by looking."""
    captions = ["bread", "tangerine", "red apple", "pineapple", "brick", "owl"]
    images = engine(captions, **SETTINGS, hires_scale=scale, hires_strength=strength)
    size = images[0].size
    plain = [image.resize(size, Image.Resampling.BICUBIC) for image in engine(captions, **SETTINGS)]
    under = ["128 px, enlarged"] * len(plain) + [f"hires fix {scale}"] * len(images)
    settings = {"prompt": "; ".join(captions), **SETTINGS, "hires_scale": scale, "hires_strength": strength}
    save(grid([*plain, *images], len(plain), under), IMAGES / "hires-fix.webp", settings=settings)


def weights(engine: Engine) -> None:
    """A colour's weight from small to large, in both grammars that have weights. Chosen by looking."""
    images, under = [], []
    for syntax, form in (("a1111", "a ({}:{}) {}"), ("compel", "a ({}){} {}")):
        for colour, thing in (("green", "lobster"), ("purple", "camel")):
            prompts = [form.format(colour, weight, thing) for weight in (0.2, 0.4, 0.7, 1.0, 1.5, 2.0)]
            images += engine(prompts, **SETTINGS, prompt_syntax=syntax)
            under += prompts
    save(grid(images, 6, under), IMAGES / "weights.webp", settings={"prompt": "; ".join(under), **SETTINGS})


def tiles(prompt: str = "brick", tile: int = 128) -> None:
    """A picture decoded at once, the same in tiles, and where they differ, amplified to half of the range."""
    drawn = []
    for side in (None, tile):
        with Engine.load(tile=side) as engine:
            drawn += engine(prompt, width=256, height=256, **SETTINGS)
    whole, tiled = (np.asarray(image).astype(int) for image in drawn)
    gain = max(1, 127 // max(1, abs(tiled - whole).max()))
    apart = Image.fromarray((127 + gain * (tiled - whole)).astype(np.uint8))
    under = ["at once", f"tiles of {tile}", f"difference x{gain}"]
    save(grid([*drawn, apart], 3, under), IMAGES / "tiles.webp", settings={"prompt": prompt, **SETTINGS})


def add_ons(path: Path = IMAGES / "add-ons.png") -> None:
    """The embedded model's add-ons in one batch: its things plainly, in other looks, and what is made of grey ones."""
    names = [f"a {thing}" for thing in THINGS]
    wanted = [f"a {colour} {thing}" for colour, thing in zip(COLOURS, THINGS, strict=True)]
    with Engine.load(control={"grey": "emoji-grey"}, adapters={look: look for look in LOOKS}) as engine:
        hints = [grey(image) for image in engine(names, **SETTINGS)]
        rows: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in names]
        rows += [(name, {"lora": {look: 1.0}}) for look in LOOKS for name in names]
        rows += [(name, {"control": {"grey": hint}}) for name, hint in zip([*names, *wanted], 2 * hints, strict=True)]
        jobs = [job for name, own in rows for job in engine.jobs(request_from(name, {**SETTINGS, **own}))]
        engine.run(jobs)
        drawn = [*engine.pictures(jobs)]
    count = len(names)
    drawn[3 * count : 3 * count] = [hint.convert("RGB") for hint in hints]
    under = [*names, *(look for look in LOOKS for _ in names), *["a grey hint"] * count, *names, *wanted]
    save(grid(drawn, count, under), path, settings={"prompt": "; ".join(names), **SETTINGS})


def scribbles(path: Path = IMAGES / "scribbles.png") -> None:
    """Drawings of a few lines, what is made of them, and in other colours. Chosen by looking: a key failed."""
    settings, colours = {**SETTINGS, "guidance": 1.5}, ("green", "yellow", "red", "blue", "purple")
    names = [f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}" for thing in DRAWN]
    wanted = [f"a {colour} {thing}" for colour, thing in zip(colours, DRAWN, strict=True)]
    lines = [scribble(thing) for thing in DRAWN]
    with Engine.load(control={"edges": "emoji-edges"}) as engine:
        asked = zip([*names, *wanted], 2 * lines, strict=True)
        drawn = [engine(name, control={"edges": inverted(one)}, **settings)[0] for name, one in asked]
    shown = [*(one.convert("RGB") for one in lines), *drawn]
    save(grid(shown, len(names), ["a drawing"] * len(names) + names + wanted), path, settings=settings)


if __name__ == "__main__":
    with Engine.load() as engine:
        sheet(engine)
        step_caching(engine)
        hires_fix(engine)
        weights(engine)
    by_command("captions.png", *spread(64), "--guidance", "2.5")
    by_command("combined.png", *combinations(), "--guidance", "2.5")
    by_command("pixels.png", "--bundle", "pixels", "--count", "64", "--steps", "50")
    by_command("denoising.webp", *spread(4), "--guidance", "2.5", shown="--animate")
    forward_noise()
    tiles()
    add_ons()
    scribbles()
