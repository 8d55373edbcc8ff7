"""The pictures and their names: Fluent 3D emoji (MIT) on npm, named and tagged by emojibase (MIT)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PICTURES, NAMES = "@lobehub/fluent-emoji-3d@1.1.0", "emojibase-data@17.0.0"
SIDE = 128
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentrt"  # work folders, one a recipe
COMPONENTS, FLAGS = 2, 9  # groups that are left out


@dataclass(frozen=True)
class Emoji:
    """One emoji: its name, other words for it, and the group and subgroup that emojibase puts it in."""

    name: str
    tags: tuple[str, ...]
    group: int
    subgroup: int


@dataclass(frozen=True)
class Data:
    """All emoji, in emojibase's order.

    Attributes:
        emoji: what they are, N of them.
        pictures: uint8 of shape (N, 128, 128, 4): red, green and blue times alpha, alpha.
    """

    emoji: list[Emoji]
    pictures: NDArray[np.uint8]


def collect(work: Path) -> Data:
    """Fetch both packages by npm, match pictures to names by code point, and keep the result in `work`."""
    with package(PICTURES, work) as pictures:
        found = [(entry, _picture(pictures, entry["hexcode"].lower())) for entry in entries(work)]
    drawn = [(_emoji(entry), picture) for entry, picture in found if picture is not None]
    data = Data([emoji for emoji, _ in drawn], np.stack([picture for _, picture in drawn]))
    np.save(work / "pictures.npy", data.pictures)
    (work / "emoji.json").write_text(json.dumps([vars(emoji) for emoji in data.emoji], indent=0))
    return data


def entries(work: Path) -> list[dict[str, Any]]:
    """Return emojibase's entries, as it has them, without flags and components."""
    with package(NAMES, work) as names:
        found = json.load(member(names, "en/data.json"))
    return [entry for entry in found if entry.get("group") not in (None, COMPONENTS, FLAGS)]


def load(work: Path) -> Data:
    """What `collect` kept."""
    known = json.loads((work / "emoji.json").read_text())
    emoji = [Emoji(entry["name"], tuple(entry["tags"]), entry["group"], entry["subgroup"]) for entry in known]
    return Data(emoji, np.load(work / "pictures.npy", mmap_mode="r"))


def on_white(pictures: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pictures (..., 4) with premultiplied alpha as RGB (..., 3) on white."""
    return pictures[..., :3] + (255 - pictures[..., 3:])


def package(name: str, work: Path) -> tarfile.TarFile:
    """An npm package's archive, fetched once; npm checks its digest."""
    path = work / (name.removeprefix("@").replace("/", "-").replace("@", "-") + ".tgz")
    if not path.exists():
        if shutil.which("npm") is None:
            raise SystemExit("npm is needed to fetch the pictures: install Node.js")
        work.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", "--pack-destination", str(work), name], check=True)
    return tarfile.open(path)


def member(package: tarfile.TarFile, path: str) -> IO[bytes]:
    found = package.extractfile(f"package/{path}")
    assert found is not None
    return found


def file_of(pictures: tarfile.TarFile, code: str, kind: str) -> IO[bytes] | None:
    """A code point's file: with or without the selector that asks for an emoji rather than a text sign."""
    for name in (code, f"{code}-fe0f", code.replace("-fe0f", "")):
        try:
            return member(pictures, f"assets/{name}.{kind}")
        except KeyError:
            continue
    return None


def _picture(pictures: tarfile.TarFile, code: str) -> NDArray[np.uint8] | None:
    file = file_of(pictures, code, "webp")
    return None if file is None else resized(Image.open(file).convert("RGBa"), SIDE)  # premultiplied


def resized(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """A picture with premultiplied alpha, `side` pixels large. LANCZOS makes colours beyond their alpha, which are cut:
    on white they would begin again at black.
    """
    pixels = np.asarray(image.resize((side, side), Image.Resampling.LANCZOS))
    return np.concatenate([np.minimum(pixels[..., :3], pixels[..., 3:]), pixels[..., 3:]], -1)


def _emoji(entry: dict[str, Any]) -> Emoji:
    words = tuple(tag.lower() for tag in entry.get("tags", ()))
    return Emoji(entry["label"].lower(), words, entry["group"], entry["subgroup"])
