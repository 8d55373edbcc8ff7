"""File names of pictures, checked before anything is drawn."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from latentrt.errors import OutputError, RequestError
from latentrt.images.animation import FORMATS as ANIMATIONS
from latentrt.images.files import FORMATS

# Pictures that latentrt does not write; otherwise "x.gif" would quietly become "x.gif.png".
_FOREIGN = (
    *(".gif", ".bmp", ".dib", ".tif", ".tiff", ".avif", ".heic", ".heif", ".jxl", ".jp2", ".jfif", ".jpe"),
    *(".apng", ".ico", ".svg", ".pdf", ".psd", ".tga", ".ppm"),
)
_NAME_BYTES = 255  # of a file name, on every file system in common use


def with_suffix(pattern: str, format: str | None) -> str:
    """Return the pattern with the suffix of `format`; without one, with its own suffix, or else .png.

    Raises:
        RequestError: a format or a suffix that latentrt does not write.
    """
    known = ", ".join(suffix[1:] for suffix in FORMATS)
    if format is not None and f".{format.lower()}" not in FORMATS:
        raise RequestError(f"--format is {format!r}", needed=f"one of {known}")
    suffix = Path(pattern).suffix
    if suffix.lower() in _FOREIGN:
        raise RequestError(f"--output ends in {suffix}", needed=f"one of {known}")
    own = suffix.lower() in FORMATS
    if format is None:
        return pattern if own else f"{pattern}.png"
    return f"{pattern[: -len(suffix)] if own else pattern}.{format.lower()}"


def check_grid(grid: Path | None) -> None:
    """Refuse a contact sheet that could not be written.

    Raises:
        RequestError: an unknown suffix.
        OutputError: see `check_writable`.
    """
    if grid is None:
        return
    if grid.suffix.lower() not in FORMATS:
        raise RequestError(f"--grid is {grid}", needed=f"a suffix among {', '.join(FORMATS)}")
    check_writable(grid)


def check_animation(path: Path | None) -> None:
    """Refuse an animation that could not be written. Raise as `check_grid`."""
    if path is None:
        return
    if path.suffix.lower() not in ANIMATIONS:
        raise RequestError(f"--animate is {path}", needed=f"a suffix among {', '.join(ANIMATIONS)}")
    check_writable(path)


def check_folder(pattern: str) -> None:
    """Refuse a pattern whose folder, as far as it has no fields, could not be written to; see `check_writable`."""
    literal = pattern.partition("{")[0]
    check_writable(Path(literal if literal == pattern else os.path.join(os.path.dirname(literal), "x")))


def check_writable(path: Path) -> None:
    """Refuse a path that cannot become a file. No folder is made before there is something to write.

    Raises:
        OutputError: the path is a folder, a part of it is a file or too long, or its folder takes no files.
    """
    if any(len(os.fsencode(part)) > _NAME_BYTES for part in path.parts):
        raise OutputError(f"{path} has a name longer than {_NAME_BYTES} bytes", needed="a shorter name")
    try:
        folder = path.parent
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        if path.is_dir():
            problem = "it is a folder"
        elif not folder.is_dir():
            problem = f"{folder} is not a folder"
        elif not os.access(folder, os.W_OK | os.X_OK):
            problem = f"no permission to write in {folder}"
        else:
            return
    except (OSError, ValueError) as error:
        problem = str(error)
    raise OutputError(f"{path} cannot be written: {problem}", needed="a file name in a folder that takes files")


def check_distinct(paths: Iterable[Path]) -> None:
    """Refuse to write two things to one file, however it is spelt.

    Raises:
        RequestError: names each such file.
    """
    counts = Counter(os.path.realpath(path) for path in paths)
    twice = sorted(os.path.relpath(path) for path, count in counts.items() if count > 1)
    if twice:
        shown = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        raise RequestError(
            f"{max(counts.values())} pictures would go to {shown}",
            needed="a name for each",
            fix="add {seed} or {index} to --output",
        )
